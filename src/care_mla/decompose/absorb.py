"""Biases absorbed into weights, for engines whose DeepSeek attention has none.

A bias b adds b * 1 to W x. The linear map of x that comes nearest to the constant 1 is w = C^(-1) E[x], with
the mean squared error E(1 - w.x)^2 = 1 - E[x] C^(-1) E[x], so that W + b w^T stands in for W and b. Reads
`LayerInputs`, returns `Decomposition`s.
"""
# Shapes: D hidden_size, N query heads, G KV heads, H head_dim, J rope-key heads, P qk_rope_head_dim.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from care_mla.decompose.layer_inputs import Decomposition, LayerInputs
from care_mla.factors import LatentLayer


def constant_map(inputs: LayerInputs) -> Tensor:
    """The w (D) that minimises E(1 - w.x)^2 under the damped covariance: C^(-1) E[x]."""
    return torch.linalg.solve(inputs.damped_c_DD, inputs.mean_D)


def constant_error(inputs: LayerInputs) -> float:
    """E(1 - w.x)^2 over the calibration tokens: 0 where absorbing is exact, 1 where biases are lost."""
    w_D = constant_map(inputs)
    return float(1 - 2 * w_D @ inputs.mean_D + w_D @ inputs.c_DD @ w_D)


def absorbing(
    factor: Callable[[LayerInputs], Decomposition],
) -> Callable[[LayerInputs], Decomposition]:
    """A method of the decoupled form that gives layers without biases.

    Queries and values take theirs in before anything is factored. That of keys is left to the method, which
    drops it exactly from the parts without RoPE (softmax does); what it leaves on the rope key is taken in
    last.
    """

    def factored(inputs: LayerInputs) -> Decomposition:
        w_D = constant_map(inputs)
        decomposition = factor(
            replace(
                inputs,
                w_q_NHD=_taken_in(inputs.w_q_NHD, inputs.b_q_NH, w_D),
                w_v_GHD=_taken_in(inputs.w_v_GHD, inputs.b_v_GH, w_D),
                b_q_NH=None,
                b_v_GH=None,
            )
        )

        def cut(ranks: tuple[int, ...]) -> LatentLayer:
            layer = decomposition.cut(ranks)
            assert layer.k_rope_JPD is not None
            rope_JPD = _taken_in(layer.k_rope_JPD, layer.k_rope_bias_JP, w_D)
            return replace(layer, k_rope_JPD=rope_JPD, k_rope_bias_JP=None)

        return replace(decomposition, cut=cut)

    return factored


def _taken_in(weight_XHD: Tensor, bias_XH: Tensor | None, w_D: Tensor) -> Tensor:
    return weight_XHD if bias_XH is None else weight_XHD + bias_XH[..., None] * w_D
