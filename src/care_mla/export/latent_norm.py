"""Scales that make DeepSeek's norm on the latent linear, so that stock classes compute what the factors say.

Stock classes send the latent c through an RMSNorm, c w / sqrt(mean c^2 + eps). Where mean c^2 is far below
eps this is c w / sqrt(eps): the down-projection is scaled until that holds for every token that can occur,
and the weight w brings the latent back to about 1. Reads weights; writes nothing.
"""
# Shapes: D hidden_size, R kv_lora_rank.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from care_mla.errors import ExportError

# transformers builds this norm without the configuration's eps. Residual scaling (residual.py) sets all other
# norms' eps to the same value, so that engines which read the configuration agree with it.
NORM_EPS = 1e-6
# The norm shrinks a token by (rms^2 / eps) / 2: by 5e-7 in the worst case, below float32's rounding.
MAX_RMS = 1e-6
TYPICAL_RMS = 1e-7


@dataclass(frozen=True)
class LinearNorm:
    """An RMSNorm that multiplies by `weight / sqrt(eps)`: (up_scale up) norm(down_scale down x) = up down x.

    `bound` is the largest rms that any token's scaled latent can have. `down_scale` and `weight` are powers
    of two, which every dtype but float16 holds exactly.
    """

    bound: float
    down_scale: float
    weight: float
    up_scale: float


def latent_norm(
    down_RD: Tensor,
    input_norm_D: Tensor,
    *,
    eps: float = NORM_EPS,
    typical_rms: float = TYPICAL_RMS,
    max_rms: float = MAX_RMS,
) -> LinearNorm:
    """The norm on the latent of a layer, by a bound that needs no tokens.

    The attention input is w_in * x with |x| <= sqrt(D), since it comes from an RMSNorm; so the latent's rms
    is at most sigma_max(down diag(w_in)) sqrt(D / R).

    Args:
        down_RD: the down-projection, unscaled.
        input_norm_D: the weight of `input_layernorm`.
        eps: of the norm on the latent in the engine.
        typical_rms: what a typical token's scaled latent is to have; likewise `max_rms`, the bound for all.
    """
    seen_RD = down_RD.double() * input_norm_D.to(down_RD.device, torch.float64)
    rank, hidden = seen_RD.shape
    largest = torch.linalg.eigvalsh(seen_RD @ seen_RD.T)[-1].clamp_min(0).sqrt().item()
    # Of a token whose channels are independent and of unit variance.
    typical = (seen_RD.square().sum() / rank).sqrt().item()
    return _linear_norm(largest * math.sqrt(hidden / rank), typical, eps, typical_rms, max_rms)


def query_norm(input_norm_D: Tensor) -> LinearNorm:
    """The norm on [x ; 1], the query's latent where queries have a bias (see deepseek.py)."""
    weight_D = input_norm_D.double()
    hidden = len(weight_D)
    largest = weight_D.abs().max().item()
    bound = math.sqrt((hidden * largest**2 + 1) / (hidden + 1))
    typical = math.sqrt((weight_D.square().sum().item() + 1) / (hidden + 1))
    return _linear_norm(bound, typical, NORM_EPS, TYPICAL_RMS, MAX_RMS)


def _linear_norm(bound: float, typical: float, eps: float, typical_rms: float, max_rms: float) -> LinearNorm:
    if bound == 0:
        bound = typical = 1.0  # nothing passes through, whatever the scale
    down_scale = 2.0 ** math.floor(math.log2(min(max_rms / bound, typical_rms / typical)))
    # After the norm a typical latent is about 1, which any cache dtype holds well.
    weight = 2.0 ** round(math.log2(math.sqrt(eps) / (down_scale * typical)))
    return LinearNorm(
        bound=bound * down_scale,
        down_scale=down_scale,
        weight=weight,
        up_scale=math.sqrt(eps) / (down_scale * weight),
    )


def refuse_float16(dtype: torch.dtype) -> None:
    """Refuse the one dtype whose range ends above the scaled latent.

    Raises:
        ExportError: `dtype` is float16.
    """
    if dtype is torch.float16:
        raise ExportError(
            "--profile deepseek-v3 cannot be written in float16: the latent is scaled to 1e-7, which "
            "float16 rounds to zero, and the model would lose its keys and values. Nothing was written. "
            "Choose --dtype bfloat16 or --dtype float32."
        )
