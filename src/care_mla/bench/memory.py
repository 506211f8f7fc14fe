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
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from care_mla import console as terminal
from care_mla.bench.decode import contexts_of, load, tokens_of
from care_mla.bench.rows import add_ratios, row
from care_mla.bench_config import BenchConfig
from care_mla.calibrate.sample import cache_argument
from care_mla.device import peak_memory, pick_device
from care_mla.errors import CareError
from care_mla.evaluate.cache import cached_tensors
from care_mla.evaluate.models import open_model

# A prompt goes through in pieces, as engines do it: activations must not hide the cache.
PIECE = 512


def bench_memory(config: BenchConfig) -> list[dict[str, Any]]:
    """Rows of the cache's bytes and of the most bytes in use, for every model and context.

    Raises:
        CareError: a model cannot be opened, is not made for so many tokens, or its process ended.
    """
    device = pick_device(config.device)
    opened = [
        open_model(name, device=device, trust_remote_code=config.trust_remote_code) for name in config.models
    ]
    contexts = contexts_of(config, opened)
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
    words = [sys.executable, "-m", "care_mla.bench.memory", json.dumps(options, default=str)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise CareError(
            f"{name}: the process that measures its memory ended early ({last[0]}). If memory ran out, try "
            f"a shorter --context than {contexts[-1]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def measure(config: BenchConfig) -> list[dict[str, int]]:
    """Bytes after each context, of the first model of a config; what is reached stays reached on a CPU."""
    device = pick_device(config.device)
    opened = open_model(config.models[0], device=device, trust_remote_code=config.trust_remote_code)
    model = load(opened, config, device)
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
    sys.stdout.write(json.dumps(measure(BenchConfig(**options))) + "\n")


if __name__ == "__main__":
    main()
