"""Attention that is watched: the same numbers as the stock kernels, plus what calibration needs from inside.

Registered with transformers as the attention implementation `care_observed`; the `observer` of the decoder
layer's `self_attn` receives every call.
"""
# Shapes: B sequences, L positions, N query heads, G KV heads, K query heads per KV head, H head_dim,
#         F frequencies (H/2); T query positions of a block of rows, C key positions that they may see.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from care_mla.calibrate.statistics import RotationSums
from care_mla.plan import ATTENTION_ROWS

OBSERVED = "care_observed"
# Rows of attention probabilities held at once, for the query heads of one KV head: memory grows with L alone.
ROWS = ATTENTION_ROWS


def observed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, (B, N, L, H) in, (B, L, N, H) out, by `module.observer`."""
    assert attention_mask is None, "calibration blocks are packed: only the future is masked"
    assert dropout == 0.0
    turn = module.observer.turn
    output_BNLH = module.observer.attend(
        turn.arrange(query), turn.arrange(key), value, scaling, sliding_window
    )
    return output_BNLH.transpose(1, 2), None


@contextmanager
def observe(layer: nn.Module, observer: RotationObserver | FisherObserver) -> Iterator[None]:
    """Attach an observer to a decoder layer's attention for the duration of the block."""
    attention: Any = layer.self_attn
    attention.observer = observer
    try:
        yield
    finally:
        del attention.observer


@dataclass(frozen=True)
class Turn:
    """RoPE as complex numbers: position t multiplies pair f by `scale` * `turn_LF[t, f]`.

    `order` is that of a head's dimensions which makes all of it pairs (`pair_order`); None: as it is.
    """

    turn_LF: Tensor
    scale: float
    order: list[int] | None = None

    @classmethod
    def of(cls, inv_freq_F: Tensor, length: int, scale: float, order: list[int] | None = None) -> Turn:
        """The rotations of positions 0 … length-1; angles are taken in float64."""
        angle_LF = torch.arange(length, device=inv_freq_F.device).double()[:, None] * inv_freq_F.double()
        turn_LF = torch.polar(torch.ones_like(angle_LF), angle_LF).to(torch.complex64)
        return cls(turn_LF, scale, None if order is None or order == sorted(order) else order)

    def arrange(self, x_BNLH: Tensor) -> Tensor:
        """Queries or keys of the stock layer with their dimensions in `order`."""
        return x_BNLH if self.order is None else x_BNLH[..., self.order]

    def undo(self, x_BNLH: Tensor) -> Tensor:
        """A rotated query or key as it was before RoPE, complex (B, N, L, F)."""
        return as_complex(x_BNLH) * self.turn_LF.conj() / self.scale

    def pull_back(self, grad_BNLH: Tensor) -> Tensor:
        """The gradient before RoPE from the one after it, complex (B, N, L, F)."""
        return as_complex(grad_BNLH) * self.turn_LF.conj() * self.scale


def as_complex(x_H: Tensor, dim: int = -1) -> Tensor:
    """Half-split pairs (f, f + F) along an axis as complex numbers."""
    real_F, imag_F = x_H.chunk(2, dim=dim)
    return torch.complex(real_F.contiguous(), imag_F.contiguous())


def as_pairs(x_F: Tensor, dim: int = -1) -> Tensor:
    """Complex numbers back to half-split pairs along an axis."""
    return torch.cat([x_F.real, x_F.imag], dim=dim)


class RowBlock(NamedTuple):
    """A block of query positions, and the key positions that any of them may see.

    `unseen_TX` marks, for the last X of these keys, which queries must not see them.
    """

    queries: slice
    keys: slice
    unseen_TX: Tensor


def row_blocks(length: int, sliding_window: int | None, device: torch.device) -> list[RowBlock]:
    """All queries in blocks of `ROWS`, each with the keys from its first query's window to its last query."""
    blocks = []
    for start in range(0, length, ROWS):
        stop = min(start + ROWS, length)
        first = 0 if sliding_window is None else max(0, start - sliding_window + 1)
        # Without a window, everything before the block is seen by all of it.
        keys_X = torch.arange(start if sliding_window is None else first, stop, device=device)
        ahead_TX = keys_X - torch.arange(start, stop, device=device)[:, None]
        unseen_TX = ahead_TX > 0
        if sliding_window is not None:
            unseen_TX |= ahead_TX <= -sliding_window
        blocks.append(RowBlock(slice(start, stop), slice(first, stop), unseen_TX))
    return blocks


def probabilities(query_KTH: Tensor, key_CH: Tensor, unseen_TX: Tensor) -> Tensor:
    """Attention of scaled queries to keys, (K, T, C)."""
    score_KTC = query_KTH @ key_CH.T
    score_KTC[..., -unseen_TX.shape[1] :].masked_fill_(unseen_TX, -torch.inf)
    return score_KTC.softmax(-1)


class RotationObserver:
    """Adds to `sums` what rotation each head really sees.

    After a call, `received_BL` is the attention that each position received from all queries and heads.
    """

    received_BL: Tensor

    def __init__(self, sums: RotationSums, turn: Turn) -> None:
        self.sums = sums
        self.turn = turn

    def attend(
        self, query_BNLH: Tensor, key_BGLH: Tensor, value_BGLH: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        batch, num_groups, length, _ = key_BGLH.shape
        query_BGKLH = (query_BNLH * scaling).unflatten(1, (num_groups, -1))
        output_BGKLH = torch.empty_like(query_BGKLH)
        query_energy_BGKLF = as_complex(query_BGKLH).abs().square()
        # |k|^2 cos, |k|^2 sin and |k|^2 of each key position, so that one product sums all three over keys.
        key_energy_BGLF = as_complex(key_BGLH).abs().square()
        turned_BGLH = as_pairs(key_energy_BGLF * self.turn.turn_LF)
        features_BGLX = torch.cat([turned_BGLH, key_energy_BGLF], dim=-1)
        num_freqs = key_energy_BGLF.shape[-1]
        self.received_BL = query_BNLH.new_zeros(batch, length)
        turned_GKF = self.sums.turned_NF.unflatten(0, (num_groups, -1))
        weight_GKF = self.sums.weight_NF.unflatten(0, (num_groups, -1))
        for rows in row_blocks(length, window, query_BNLH.device):
            back_TF = self.turn.turn_LF[rows.queries].conj()
            for b in range(batch):
                for g in range(num_groups):
                    prob_KTC = probabilities(
                        query_BGKLH[b, g, :, rows.queries], key_BGLH[b, g, rows.keys], rows.unseen_TX
                    )
                    output_BGKLH[b, g, :, rows.queries] = prob_KTC @ value_BGLH[b, g, rows.keys]
                    self.received_BL[b, rows.keys] += prob_KTC.sum((0, 1))
                    # a(1 - a) is how much an output moves with a logit.
                    weight_KTC = prob_KTC.addcmul_(prob_KTC, prob_KTC, value=-1.0)
                    seen_KTX = weight_KTC @ features_BGLX[b, g, rows.keys]
                    energy_KTF = query_energy_BGKLF[b, g, :, rows.queries]
                    seen_KTF = as_complex(seen_KTX[..., : 2 * num_freqs])
                    turned_GKF[g] += (energy_KTF * back_TF * seen_KTF).sum(1)
                    weight_GKF[g] += (energy_KTF * seen_KTX[..., 2 * num_freqs :]).sum(1)
        self.sums.tokens += batch * length
        return output_BGKLH.flatten(1, 2)


class FisherObserver:
    """Catches the gradients at keys and values of one micro-batch during its backward pass.

    After `backward`: `grad_k_BLGH` at the key before RoPE, `grad_v_BLGH` at the value, and `grad_nope_BLGH`
    at the key that has lost RoPE and keeps its mean: with g_ts the gradient at the scaled logit,
    sum over the group's heads of conj(gamma_h) * sum_t g_ts q_h,t * scaling, where q is the query before
    RoPE, times the square of RoPE's amplitude.
    """

    grad_k_BLGH: Tensor
    grad_nope_BLGH: Tensor
    grad_v_BLGH: Tensor
    q_energy_NF: Tensor

    def __init__(self, gamma_NF: Tensor, turn: Turn) -> None:
        self.gamma_NF = gamma_NF.to(torch.complex64)
        self.turn = turn

    def attend(
        self, query_BNLH: Tensor, key_BGLH: Tensor, value_BGLH: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        return _ObservedAttention.apply(query_BNLH, key_BGLH, value_BGLH, scaling, window, self)

    def without_rope(self, query_BNLH: Tensor) -> Tensor:
        """conj(gamma_h) q_h with q before RoPE; its energy is kept on the way."""
        plain_BNLF = self.turn.undo(query_BNLH)
        self.q_energy_NF = plain_BNLF.abs().square().sum((0, 2))
        return as_pairs(self.gamma_NF.conj()[:, None] * plain_BNLF) * self.turn.scale**2

    def catch(self, grad_key_BGLH: Tensor, grad_nope_BGLH: Tensor, grad_value_BGLH: Tensor) -> None:
        """Take the gradients at the rotated keys, the keys without RoPE, and the values."""
        self.grad_k_BLGH = as_pairs(self.turn.pull_back(grad_key_BGLH)).transpose(1, 2)
        self.grad_nope_BLGH = grad_nope_BGLH.transpose(1, 2)
        self.grad_v_BLGH = grad_value_BGLH.transpose(1, 2)


class _ObservedAttention(torch.autograd.Function):
    """Attention that keeps no probabilities: the backward pass finds each block of them again."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BNLH: Tensor,
        key_BGLH: Tensor,
        value_BGLH: Tensor,
        scaling: float,
        window: int | None,
        observer: FisherObserver,
    ) -> Tensor:
        batch, num_groups, length, _ = key_BGLH.shape
        query_BGKLH = (query_BNLH * scaling).unflatten(1, (num_groups, -1))
        output_BGKLH = torch.empty_like(query_BGKLH)
        for rows in row_blocks(length, window, query_BNLH.device):
            for b in range(batch):
                for g in range(num_groups):
                    prob_KTC = probabilities(
                        query_BGKLH[b, g, :, rows.queries], key_BGLH[b, g, rows.keys], rows.unseen_TX
                    )
                    output_BGKLH[b, g, :, rows.queries] = prob_KTC @ value_BGLH[b, g, rows.keys]
        output_BNLH = output_BGKLH.flatten(1, 2)
        ctx.save_for_backward(query_BNLH, key_BGLH, value_BGLH, output_BNLH)
        ctx.scaling, ctx.window, ctx.observer = scaling, window, observer
        return output_BNLH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_BNLH,) = grads
        query_BNLH, key_BGLH, value_BGLH, output_BNLH = ctx.saved_tensors
        batch, num_groups, length, head_dim = key_BGLH.shape
        # Softmax's gradient at a logit is a (da - sum a da), and that sum is the output times its gradient.
        mean_BGKL1 = (grad_BNLH * output_BNLH).sum(-1, keepdim=True).unflatten(1, (num_groups, -1))
        grad_BGKLH = grad_BNLH.unflatten(1, (num_groups, -1))
        # Rotated queries and those without RoPE side by side, since the logits' gradient multiplies both.
        pair_BNLX = torch.cat([query_BNLH, ctx.observer.without_rope(query_BNLH)], dim=-1) * ctx.scaling
        pair_BGKLX = pair_BNLX.unflatten(1, (num_groups, -1))
        grad_query_BGKLH = torch.empty_like(grad_BGKLH)
        grad_pair_BGLX = key_BGLH.new_zeros(batch, num_groups, length, 2 * head_dim)
        grad_value_BGLH = torch.zeros_like(value_BGLH)
        for rows in row_blocks(length, ctx.window, query_BNLH.device):
            for b in range(batch):
                for g in range(num_groups):
                    at, keys = (b, g, slice(None), rows.queries), (b, g, rows.keys)
                    pair_KTX, grad_KTH = pair_BGKLX[at], grad_BGKLH[at]
                    prob_KTC = probabilities(pair_KTX[..., :head_dim], key_BGLH[keys], rows.unseen_TX)
                    grad_KTC = grad_KTH @ value_BGLH[keys].T
                    grad_KTC.sub_(mean_BGKL1[at]).mul_(prob_KTC)
                    grad_query_BGKLH[at] = grad_KTC @ key_BGLH[keys]
                    grad_pair_BGLX[keys] += grad_KTC.flatten(0, 1).T @ pair_KTX.flatten(0, 1)
                    grad_value_BGLH[keys] += prob_KTC.flatten(0, 1).T @ grad_KTH.flatten(0, 1)
        grad_key_BGLH, grad_nope_BGLH = grad_pair_BGLX.split(head_dim, dim=-1)
        ctx.observer.catch(grad_key_BGLH, grad_nope_BGLH, grad_value_BGLH)
        grad_query_BNLH = grad_query_BGKLH.flatten(1, 2) * ctx.scaling
        return grad_query_BNLH, grad_key_BGLH, grad_value_BGLH, None, None, None
