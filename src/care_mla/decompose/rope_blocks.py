"""Which frequencies share a pair of the rope key, and the angle that the pair turns by.

A rope key of width P has P/2 pairs, the source F frequencies per head. Reads `LayerInputs`.
"""
# Shapes: G KV heads, F frequencies (H/2), B = P/2 blocks, K frequencies of a block at most, S stacked keys of
#         a block (G*K), P qk_rope_head_dim, X any trailing axes.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from care_mla.decompose.layer_inputs import LayerInputs


@dataclass(frozen=True)
class RopeBlocks:
    """Block b holds the frequencies `members_BK[b]` where `held_BK[b]`, and turns by `inv_freq_B[b]`.

    No frequency is in two blocks; one that is in none goes wholly without RoPE.
    """

    inv_freq_B: Tensor
    members_BK: Tensor
    held_BK: Tensor

    def stack(self, x_GFX: Tensor) -> Tensor:
        """The entries of each block, KV head by KV head, with zeros where it holds fewer: (B, S, X)."""
        x_GBKX = x_GFX[:, self.members_BK]
        held_BKX = self.held_BK.view(*self.held_BK.shape, *[1] * (x_GFX.ndim - 2))
        return (x_GBKX * held_BKX).transpose(0, 1).flatten(1, 2)

    def unstack(self, x_BSX: Tensor, like_GFX: Tensor) -> Tensor:
        """Entries of blocks back at their frequencies, zero at those that no block holds."""
        x_BGKX = x_BSX.unflatten(1, (len(like_GFX), -1))
        out_GFX = torch.zeros_like(like_GFX)
        out_GFX[:, self.members_BK[self.held_BK]] = x_BGKX.transpose(1, 2)[self.held_BK].transpose(0, 1)
        return out_GFX


def rope_blocks(inputs: LayerInputs, num_blocks: int, *, plain_table: bool = False) -> RopeBlocks:
    """Neighbouring frequencies share a pair: F/B each, at the first one's angle.

    With a plain table the angles are theta^(-b/B). A frequency that the source scales goes to the block whose
    angle is nearest to its true one in ratio, half a step of the table away at most; those slower than the
    last angle, which hardly turn, go without RoPE. docs/rope.md says what that costs.

    Args:
        num_blocks: B, a divisor of F.
        plain_table: whether blocks turn by plain RoPE's angles whatever the source's scaling.
    """
    # Pairs of a head beyond these do not turn at all.
    inv_freq_F = inputs.inv_freq_F[: inputs.rotary_dim // 2]
    unscaled_F = inputs.unscaled_F[: len(inv_freq_F)]
    num_freqs, device = len(inv_freq_F), inv_freq_F.device
    assert num_freqs % num_blocks == 0, f"{num_blocks} blocks do not divide {num_freqs} frequencies"
    size = num_freqs // num_blocks
    block_F = torch.arange(num_freqs, device=device) // size
    inv_freq_B = inv_freq_F[::size]
    if plain_table:
        order_B = torch.arange(num_blocks, device=device, dtype=torch.float64)
        inv_freq_B = inputs.rope_theta ** (-order_B / num_blocks)
        # How many steps of the table a frequency lies below 1.
        steps_F = -inv_freq_F.log() / torch.tensor(inputs.rope_theta).double().log() * num_blocks
        nearest_F = steps_F.round().clamp(max=num_blocks - 1).long()
        block_F = torch.where(unscaled_F, block_F, nearest_F)
        block_F[~unscaled_F & (steps_F > num_blocks - 0.5)] = num_blocks
    counts_B = torch.bincount(block_F, minlength=num_blocks)[:num_blocks]
    members_BK = torch.zeros(num_blocks, int(counts_B.max()), dtype=torch.long, device=device)
    held_BK = torch.arange(members_BK.shape[1], device=device) < counts_B[:, None]
    members_BK[held_BK] = block_F.argsort(stable=True)[: int(counts_B.sum())]
    return RopeBlocks(inv_freq_B, members_BK, held_BK)
