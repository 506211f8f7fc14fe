"""Tokens per second of one sequence in transformers: a note beside the quality, not a benchmark.

Every model of a run is timed on the same tokens, device and threads. An engine's kernels give other figures.
"""
# Shapes: B sequences, L positions.

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from care_mla.calibrate.sample import cache_argument

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 256, 16, 3


def speed(model: PreTrainedModel, *, max_length: int, advance: Callable[[], None]) -> dict[str, Any]:
    """Time a prompt (prefill) and tokens after it one by one (decode); medians over repetitions.

    Args:
        max_length: the model's context; a shorter one shortens the prompt.
        advance: called after each repetition.
    """
    device = next(model.parameters()).device
    length = min(PROMPT_TOKENS, max_length - NEW_TOKENS)
    tokens_1L = torch.arange(length, device=device)[None] % model.config.vocab_size
    times = []
    for _ in range(REPEATS):
        times.append(time_tokens(model, tokens_1L, NEW_TOKENS))
        advance()
    prefill, decode = zip(*times, strict=True)
    return {
        "prefill_tokens_per_second": length / median(prefill),
        "decode_tokens_per_second": NEW_TOKENS / median(decode),
        "prompt_tokens": length,
        "new_tokens": NEW_TOKENS,
        "repeats": REPEATS,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


@torch.no_grad()
def time_tokens(model: PreTrainedModel, tokens_BL: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of a prompt, and of tokens after it one by one."""
    cached = {cache_argument(model): DynamicCache(config=model.config)}
    start = _now(tokens_BL.device)
    model(tokens_BL, use_cache=True, logits_to_keep=1, **cached)
    begin = _now(tokens_BL.device)
    for _ in range(new_tokens):
        model(tokens_BL[:, -1:], use_cache=True, **cached)
    return begin - start, _now(tokens_BL.device) - begin


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
