"""What a model really caches: counted from the tensors that a forward pass leaves in a live cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from care_mla.calibrate.sample import cache_argument

PROBE_TOKENS = 16


class LiveCache(NamedTuple):
    """Values per token per layer, mean over layers; bytes per token in all layers, and of which dtype."""

    cached_values: float | int
    bytes_per_token: int
    dtype: str


@torch.no_grad()
def live_cache(model: PreTrainedModel) -> LiveCache:
    """Run a few tokens and count what is cached for one of them; bytes at the width of the loaded weights."""
    cache = DynamicCache(config=model.config)
    tokens_1L = torch.arange(PROBE_TOKENS, device=next(model.parameters()).device)[None]
    model(tokens_1L, use_cache=True, logits_to_keep=1, **{cache_argument(model): cache})
    held = [tensor for layer in cache.layers for tensor in cached_tensors(layer)]
    # The last but one dimension counts tokens: of a sliding window only the last ones.
    values = sum(tensor.numel() // tensor.shape[-2] for tensor in held) / len(cache.layers)
    nbytes = sum(tensor.numel() * tensor.element_size() // tensor.shape[-2] for tensor in held)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in held}
    return LiveCache(int(values) if values.is_integer() else values, nbytes, ", ".join(sorted(dtypes)))


def cached_tensors(layer: Any) -> list[Tensor]:
    """What a layer of a live cache holds for its tokens."""
    return [value for value in vars(layer).values() if isinstance(value, Tensor) and value.ndim == 4]
