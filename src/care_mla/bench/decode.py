"""`care bench decode`: tokens per second of prompts and of single tokens, models in turn."""
# Shapes: B sequences, L positions.

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from care_mla import console as terminal
from care_mla.bench.rows import add_ratios, row
from care_mla.bench_config import BenchConfig
from care_mla.device import pick_device
from care_mla.errors import OptionError
from care_mla.evaluate.models import OpenedModel, open_model
from care_mla.evaluate.speed import time_tokens


def bench_decode(config: BenchConfig) -> list[dict[str, Any]]:
    """Rows of prefill and decode for every model and context; the first of each is warmed up and not kept.

    Raises:
        CareError: a model cannot be opened, or is not made for so many tokens.
    """
    device = pick_device(config.device)
    opened = [
        open_model(name, device=device, trust_remote_code=config.trust_remote_code) for name in config.models
    ]
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
                    times.append(time_tokens(model, tokens_BL, config.new_tokens))
                    progress.advance()
            for name, times in zip(config.models, seconds, strict=True):
                what = {"model": name, "context": context, "batch_size": config.batch_size}
                for metric, place, count in (("prefill", 0, context), ("decode", 1, config.new_tokens)):
                    rates = [config.batch_size * count / pair[place] for pair in times[1:]]
                    rows.append(row(rates, unit="tokens per second", metric=metric, **what))
    add_ratios(rows, config.models[0])
    return rows


def contexts_of(config: BenchConfig, opened: list[OpenedModel]) -> list[int]:
    """Lengths that all models are made for.

    Raises:
        OptionError: one that was asked for is longer.
    """
    shortest = min(opened, key=lambda one: one.max_length)
    room = shortest.max_length - config.new_tokens
    contexts = config.contexts(room)
    if contexts[-1] > room:
        raise OptionError(
            f"--context {contexts[-1]}: {shortest.name} is made for {shortest.max_length} tokens "
            f"(max_position_embeddings), {config.new_tokens} of them new ones. Try --context {room}"
        )
    return contexts


def load(one: OpenedModel, config: BenchConfig, device: torch.device) -> PreTrainedModel:
    """The model on its device, in the type that --dtype or the device says."""
    dtype = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return one.load().to(getattr(torch, dtype))


def tokens_of(batch_size: int, context: int, model: PreTrainedModel) -> torch.Tensor:
    """Any tokens, (B, L); which ones they are changes no time."""
    device = next(model.parameters()).device
    return (torch.arange(context, device=device) % model.config.vocab_size).expand(batch_size, -1)
