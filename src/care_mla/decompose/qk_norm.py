"""QK-norm in a factored layer: kept where keys are rebuilt, replaced by a linear map where they are not.

An RMSNorm between projection and RoPE is no linear map of x. The exact-rope form rebuilds the projected keys
and normalises them as the source does. The other forms cache rope keys that mix heads or are a part of a
head, which no norm over whole heads fits; their keys and queries are the linear maps nearest to the
normalised ones.
"""
# Shapes: D hidden_size, N query heads, G KV heads, H head_dim, X heads of the projection at hand, or rows of
#         a norm (1: each head by itself; all heads: all at once), E channels of x, or of [x ; 1], O rows of
#         all heads (X*H).

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class AffineMap(NamedTuple):
    """Heads of a projection, with a bias where the source has one."""

    w_XHD: Tensor
    b_XH: Tensor | None


@dataclass(frozen=True, kw_only=True)
class NormedMoments:
    """Means over calibration tokens of what QK-norm gives, y = norm(W x + b) before RoPE.

    `q_x_NHD` = E[y x^T] and `q_NH` = E[y] for queries, likewise for keys; `felt_c_DD` is that of
    `LayerInputs` with the gradient at the normalised key.
    """

    q_x_NHD: Tensor
    k_x_GHD: Tensor
    q_NH: Tensor
    k_GH: Tensor
    felt_c_DD: Tensor


@dataclass(frozen=True, kw_only=True)
class LayerQkNorm:
    """One layer's norms of queries and keys: weights, and moments where every head has its own norm."""

    q_norm_XH: Tensor
    k_norm_XH: Tensor
    moments: NormedMoments | None


def nearest_map(
    source: AffineMap,
    norm_XH: Tensor,
    y_x_XHD: Tensor,
    y_XH: Tensor,
    *,
    c_DD: Tensor,
    damped_c_DD: Tensor,
    mean_D: Tensor,
) -> AffineMap:
    """The linear map from x that comes nearest to y, a normalised projection of x, in mean square.

    Least squares, W = E[y x^T] C^(-1), with C damped. Damping pulls towards a W0 and not towards zero, which
    would make keys shorter: W0 is the source's own projection with the norm's weights and one scale for each
    head, in place of 1/rms, that fits best. Where y is linear in x, as without a norm, the result is exactly
    that map, whatever the damping. Only where the source has a bias is there one here.

    Args:
        source: the projection before the norm.
        norm_XH: the norm's weights.
        y_x_XHD: E[y x^T]; likewise `y_XH` = E[y].
        c_DD: E[x x^T]; likewise `damped_c_DD`, and `mean_D` = E[x].
    """
    w_XHE, b_XH = norm_XH[..., None] * source.w_XHD, source.b_XH
    y_x_XHE, c_EE, damped_c_EE = y_x_XHD, c_DD, damped_c_DD
    if b_XH is not None:
        w_XHE = torch.cat([w_XHE, (norm_XH * b_XH)[..., None]], dim=-1)
        y_x_XHE = torch.cat([y_x_XHD, y_XH[..., None]], dim=-1)
        c_EE, damped_c_EE = _with_one(c_DD, mean_D), _with_one(damped_c_DD, mean_D)
    energy_X = ((w_XHE @ c_EE) * w_XHE).sum((1, 2))
    scale_X = (y_x_XHE * w_XHE).sum((1, 2)) / energy_X.clamp_min(torch.finfo(energy_X.dtype).tiny)
    start_XHE = scale_X[:, None, None] * w_XHE
    rest_OE = (y_x_XHE - start_XHE @ c_EE).flatten(0, 1)
    chol_EE = torch.linalg.cholesky(damped_c_EE)
    map_XHE = start_XHE + torch.cholesky_solve(rest_OE.T, chol_EE).T.view_as(start_XHE)
    if b_XH is None:
        return AffineMap(map_XHE, None)
    return AffineMap(map_XHE[..., :-1], map_XHE[..., -1])


def _with_one(c_DD: Tensor, mean_D: Tensor) -> Tensor:
    """The second moment of [x ; 1]."""
    one_1 = mean_D.new_ones(1)
    return torch.cat([torch.cat([c_DD, mean_D[:, None]], dim=1), torch.cat([mean_D, one_1])[None]])
