"""`care bench decode`: tokens per second of prompts and of single tokens, models in turn."""
# Shapes: B sequences, L positions.

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from care_mla import console as terminal
from care_mla.bench.rows import add_ratios, row
from care_mla.bench_config import BenchConfig
from care_mla.device import is_out_of_memory, pick_device
from care_mla.errors import CareError, OptionError
from care_mla.evaluate.models import OpenedModel, open_model
from care_mla.evaluate.speed import time_tokens


def bench_decode(config: BenchConfig) -> list[dict[str, Any]]:
    """Rows of prefill and decode for every model and context; the first of each is warmed up and not kept.

    Raises:
        CareError: a model cannot be opened, or is not made for so many tokens.
    """
    device = pick_device(config.device)
    opened = [open_one(name, config) for name in config.models]
    contexts = contexts_of(config, opened)
    models = [load(one, config, device) for one in opened]
    rows = []
    total = len(contexts) * (config.number + 1) * len(models)
    with terminal.current().progress("Prompts and tokens", total) as progress:
        for context in contexts:
            seconds: list[list[tuple[float, float]]] = [[] for _ in models]
            for _ in range(config.number + 1):
                for model, times in zip(models, seconds, strict=True):
                    tokens_BL = tokens_of(config.batch_size, context, model)
                    times.append(_timed(model, tokens_BL, config))
                    progress.advance()
            for name, times in zip(config.models, seconds, strict=True):
                what = {"model": name, "context": context, "batch_size": config.batch_size}
                for metric, place, count in (("prefill", 0, context), ("decode", 1, config.new_tokens)):
                    rates = [config.batch_size * count / pair[place] for pair in times[1:]]
                    rows.append(row(rates, unit="tokens per second", metric=metric, **what))
    add_ratios(rows, config.models[0])
    return rows


def _timed(model: PreTrainedModel, tokens_BL: torch.Tensor, config: BenchConfig) -> tuple[float, float]:
    try:
        return time_tokens(model, tokens_BL, config.new_tokens)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        batch_size, context = tokens_BL.shape
        raise CareError(
            f"--batch-size {batch_size} --context {context}: memory ran out ({error}). All models are in "
            "memory together: try fewer sequences, a shorter context or fewer models."
        ) from error


def contexts_of(config: BenchConfig, opened: list[OpenedModel]) -> list[int]:
    """Lengths that all models are made for.

    Raises:
        OptionError: one that was asked for is longer.
    """
    shortest = min(opened, key=lambda one: one.max_length)
    made_for = f"{shortest.name} is made for {shortest.max_length} tokens (max_position_embeddings)"
    new_tokens = config.new_tokens if config.what == "decode" else 0
    room = shortest.max_length - new_tokens
    if room < 1:
        raise OptionError(f"--new-tokens {new_tokens}: {made_for}. Try --new-tokens 16")
    contexts = config.contexts(room)
    if contexts[-1] > room:
        of_them = f", {new_tokens} of them new ones" if new_tokens else ""
        raise OptionError(f"--context {contexts[-1]}: {made_for}{of_them}. Try --context {room}")
    return contexts


def open_one(name: str, config: BenchConfig) -> OpenedModel:
    """A model whose weights will be read in float32, on the CPU: a GPU need not have room for that."""
    return open_model(name, device=torch.device("cpu"), trust_remote_code=config.trust_remote_code)


def dtype_of(config: BenchConfig, device: torch.device) -> str:
    """The type of the weights, as --dtype or the device says."""
    return config.dtype or ("bfloat16" if device.type == "cuda" else "float32")


def load(one: OpenedModel, config: BenchConfig, device: torch.device) -> PreTrainedModel:
    """The model on its device, in its type."""
    model = one.load()
    nn.Module.to(model, device, getattr(torch, dtype_of(config, device)))
    return model


def tokens_of(batch_size: int, context: int, model: PreTrainedModel) -> torch.Tensor:
    """Any tokens, (B, L); which ones they are changes no time."""
    device = next(model.parameters()).device
    return (torch.arange(context, device=device) % model.config.vocab_size).expand(batch_size, -1)
