"""`care bench memory`: bytes of the cache and of the whole process, each model in a fresh one.

Run as a module with a config as JSON it is that process, and prints what it measured.
"""
# Shapes: B sequences, L positions.

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache

from care_mla import console as terminal
from care_mla.bench.decode import contexts_of, load, open_one, tokens_of
from care_mla.bench.rows import add_ratios, row
from care_mla.bench_config import BenchConfig
from care_mla.calibrate.sample import cache_argument
from care_mla.device import is_out_of_memory, peak_memory, pick_device, restart_peak
from care_mla.errors import CareError
from care_mla.evaluate.cache import cached_tensors

# A prompt goes through in pieces, as engines do it: activations must not hide the cache.
PIECE = 512
USERS_INPUT = 2  # exit code of the process, as of commands


def bench_memory(config: BenchConfig) -> list[dict[str, Any]]:
    """Rows of the cache's bytes and of the most bytes in use, for every model and context.

    Raises:
        CareError: a model cannot be opened, is not made for so many tokens, or its process ended.
    """
    pick_device(config.device)  # refuses one that is not there
    contexts = contexts_of(config, [open_one(name, config) for name in config.models])
    rows = []
    with terminal.current().progress("Processes", len(config.models) * config.number) as progress:
        for name in config.models:
            runs = []
            for _ in range(config.number):
                runs.append(_in_a_process(config, name, contexts))
                progress.advance()
            for i, context in enumerate(contexts):
                what = {"model": name, "context": context, "batch_size": config.batch_size, "unit": "bytes"}
                for metric in ("cache", "peak"):
                    rows.append(row([run[i][metric] for run in runs], metric=metric, **what))
    add_ratios(rows, config.models[0])
    return rows


def _in_a_process(config: BenchConfig, name: str, contexts: list[int]) -> list[dict[str, int]]:
    options = asdict(config) | {"models": [name], "context": ",".join(map(str, contexts)), "json": None}
    # -P: files of the working directory are no modules.
    words = [sys.executable, "-P", "-m", "care_mla.bench.memory", json.dumps(options, default=str)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode == USERS_INPUT:
        raise CareError(done.stderr.strip())
    if done.returncode < 0:  # such as by Linux itself, when memory runs out
        raise CareError(
            f"{name}: the process that measures its memory was ended by signal {-done.returncode}. If memory "
            f"ran out, {_try_less(config, contexts)}"
        )
    if done.returncode:
        raise RuntimeError(f"{name}: the process that measures its memory failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _try_less(config: BenchConfig, contexts: list[int]) -> str:
    return f"try less than --batch-size {config.batch_size} --context {contexts[-1]}"


@torch.no_grad()
def measure(config: BenchConfig) -> list[dict[str, int]]:
    """Bytes after each context, shortest first, of the first model of a config."""
    device = pick_device(config.device)
    opened = open_one(config.models[0], config)
    model = load(opened, config, device)
    restart_peak(device)  # reading weights may take more than using them
    found = []
    for context in contexts_of(config, [opened]):
        cache = DynamicCache(config=model.config)
        tokens_BL = tokens_of(config.batch_size, context, model)
        for piece_BL in tokens_BL.split(PIECE, dim=1):
            model(piece_BL, use_cache=True, logits_to_keep=1, **{cache_argument(model): cache})
        held: list[Tensor] = [tensor for layer in cache.layers for tensor in cached_tensors(layer)]
        cache_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
        found.append({"cache": cache_bytes, "peak": peak_memory(device)})
    return found


def main() -> None:
    """Measure what the first argument says."""
    options = json.loads(sys.argv[1])
    options["models"] = tuple(options["models"])
    if options["scratch"]:
        options["scratch"] = Path(options["scratch"])
    terminal.silence_transformers()
    config = BenchConfig(**options)
    try:
        found = measure(config)
    except CareError as error:
        _refuse(str(error))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        less = _try_less(config, config.contexts(1))
        _refuse(f"{config.models[0]}: memory ran out ({error}). {less.capitalize()}")
    sys.stdout.write(json.dumps(found) + "\n")


def _refuse(message: str) -> NoReturn:
    sys.stderr.write(message)
    raise SystemExit(USERS_INPUT)


if __name__ == "__main__":
    main()
