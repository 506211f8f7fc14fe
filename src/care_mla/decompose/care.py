"""Low-rank factors of one stacked projection, whose output error at every rank is known in advance.

CARE (arXiv 2603.17946) in its inverse-free form, and the other factors of a single matrix that the methods
share. Reads and writes nothing: float64 matrices in, factors out.
"""
# Shapes: D hidden_size, O rows of the stacked projection, K components of a factor.

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Eigen(NamedTuple):
    """Eigenpairs of an output second moment, largest first."""

    spectrum_O: Tensor
    up_OO: Tensor


class Factor(NamedTuple):
    """A projection `up down`, kept to rank r by its first r components.

    `spectrum_K` is the mean squared output error that dropping each component adds, so the sum from r on is
    the error at rank r. It descends only for the methods that minimise this error.
    """

    up_OK: Tensor
    down_KD: Tensor
    spectrum_K: Tensor


def column_signs(up_OK: Tensor) -> Tensor:
    """The signs (K) that make the largest entry of each column positive, so that files are reproducible."""
    largest_1K = up_OK.abs().argmax(dim=0, keepdim=True)
    return torch.where(up_OK.gather(0, largest_1K)[0] < 0, -1.0, 1.0).to(up_OK.dtype)


def covariance_factor(m_OD: Tensor, c_DD: Tensor) -> Eigen:
    """Eigenpairs of M C M^T: CARE and SVD-LLM without an inverse or a root of C.

    [M S]_r S^(-1) with S S^T = C is U_r U_r^T M for every such S, because the left singular vectors of M S
    are the eigenvectors of M C M^T. So `up = U_r`, `down = U_r^T M`, and the mean squared output error is the
    sum of the eigenvalues dropped.

    Args:
        m_OD: any stack of projections of the same input, weighted as the caller likes.
        c_DD: the (damped) second moment of that input.
    """
    eigenvalues_O, u_OO = torch.linalg.eigh(m_OD @ c_DD @ m_OD.T)
    u_OO = u_OO.flip(-1)
    # The moment is positive semidefinite: a negative eigenvalue is rounding.
    return Eigen(eigenvalues_O.flip(-1).clamp_min(0), u_OO * column_signs(u_OO))


def component_losses(up_OK: Tensor, down_KD: Tensor, c_DD: Tensor) -> Tensor:
    """The mean squared output error (K) that dropping each component adds, once all later ones are dropped.

    The error at rank r is the sum over i, j >= r of (up_i . up_j)(down_i C down_j), whatever the method;
    component i brings its own square and its products with the later ones.
    """
    products_KK = (up_OK.T @ up_OK) * (down_KD @ c_DD @ down_KD.T)
    return products_KK.diagonal() + 2 * products_KK.triu(1).sum(dim=1)


def make_factor(up_OK: Tensor, down_KD: Tensor, c_DD: Tensor) -> Factor:
    """The factor with its spectrum."""
    return Factor(up_OK, down_KD, component_losses(up_OK, down_KD, c_DD))


def project(m_OD: Tensor, up_OK: Tensor, c_DD: Tensor) -> Factor:
    """Keep the outputs of M along orthonormal columns: `down = up^T M`."""
    return make_factor(up_OK, up_OK.T @ m_OD, c_DD)


def care_factor(m_OD: Tensor, c_DD: Tensor) -> Factor:
    """CARE-U: minimise the mean of ||M x - up down x||^2 at every rank at once."""
    eigen = covariance_factor(m_OD, c_DD)
    return Factor(eigen.up_OO, eigen.up_OO.T @ m_OD, eigen.spectrum_O)


def no_root_factor(m_OD: Tensor, c_DD: Tensor) -> Factor:
    """CARE-C, the paper's ablation without the square root: minimise ||(M - up down) C||_F."""
    return project(m_OD, _left_singular(m_OD @ c_DD), c_DD)


def weight_factor(m_OD: Tensor, c_DD: Tensor) -> Factor:
    """Plain truncated SVD of the weights: minimise ||M - up down||_F. C serves the predicted error alone."""
    return project(m_OD, _left_singular(m_OD), c_DD)


def scaled_factor(m_OD: Tensor, scale_D: Tensor, c_DD: Tensor) -> Factor:
    """[M S]_r S^(-1) with S = diag(scale); the inverse cancels, so channels of scale 0 are no trouble."""
    return project(m_OD, _left_singular(m_OD * scale_D), c_DD)


def interleave(factors: Sequence[Factor], c_DD: Tensor) -> Factor:
    """Factors of stacked blocks as one, every rank spread evenly over the blocks.

    The remainder goes to the first ones. A block whose components are used up leaves its share to the others.
    """
    num_blocks = len(factors)
    turns = [torch.arange(f.up_OK.shape[1]) * num_blocks + block for block, f in enumerate(factors)]
    order_K = torch.cat(turns).argsort()
    up_OK = torch.block_diag(*(f.up_OK for f in factors))
    down_KD = torch.cat([f.down_KD for f in factors])
    return make_factor(up_OK[:, order_K], down_KD[order_K], c_DD)


def _left_singular(m_OD: Tensor) -> Tensor:
    u_OK = torch.linalg.svd(m_OD, full_matrices=False).U
    return u_OK * column_signs(u_OK)
