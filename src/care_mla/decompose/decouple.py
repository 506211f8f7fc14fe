"""Splitting keys into one shared rope key and a rest without RoPE, by complex PCA that commutes with RoPE.

A half-split pair (f, f + F) is the complex number k_f; RoPE multiplies it by e^(i theta_f t), so any complex
matrix across KV heads at one frequency commutes with it. Design, "Decoupling"; real rotations (RoRoPE) are
the special case in rope.py.
"""
# Shapes: D hidden_size, N query heads, G KV heads, H head_dim, F frequencies (H/2), K folded frequencies of a
#         block, B = P/2 blocks, P qk_rope_head_dim.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from care_mla.calibrate.attention import as_complex, as_pairs
from care_mla.decompose.layer_inputs import LayerInputs


@dataclass(frozen=True, kw_only=True)
class ComplexSplit:
    """Keys and queries split for the decoupled form; biases are None where the source has none.

    `nope_GMD` are the key rows that have lost RoPE, before any rank cut; the query rows that meet them and
    the shared rope key are `q_nope_NMD` and `q_rope_NPD`.
    """

    k_rope_PD: Tensor
    nope_GMD: Tensor
    q_rope_NPD: Tensor
    q_nope_NMD: Tensor
    k_rope_bias_P: Tensor | None
    q_rope_bias_NP: Tensor | None
    q_nope_bias_NM: Tensor | None
    inv_freq_F: Tensor


def decouple(
    inputs: LayerInputs,
    qk_rope_head_dim: int,
    *,
    use_gamma: bool = True,
    query_weights: bool = True,
    fold: bool = True,
    unscaled_only: bool = False,
) -> ComplexSplit:
    """The shared rope key that carries most of what rotation changes, and the rest with its mean rotation.

    Per block of K = H/P neighbouring frequencies, over the stacked complex keys k of all KV heads (G*K
    entries) with second moment M = E[k k^H] and weights d_g,f^2 = sum over the group's heads of E|q_h,f|^2
    max(0, 1 - |gamma_h,f|^2): with (lambda, u) the top eigenpair of D M D, the rope key is k' = u^H D k,
    rebuilt as v k' with v = M D u / lambda, and rotated at the block's first frequency. What is left,
    k - v k', loses RoPE; head h sees it times gamma_h,f.

    Args:
        qk_rope_head_dim: P; H/P frequencies share one rope pair.
        use_gamma: False takes gamma = 1 (and weights by query energy alone), for ablations.
        query_weights: False takes d = 1, for ablations.
        fold: False lets only the first frequency of each block have RoPE, for ablations.
        unscaled_only: True lets only frequencies that the source does not scale have RoPE, so that the rope
            key turns by a plain table. Blocks are as small as hold them; gamma is of the true angles.
    """
    num_blocks = qk_rope_head_dim // 2
    size = block_size(inputs.unscaled_F if unscaled_only else inputs.unscaled_F | True, num_blocks)
    num_freqs = num_blocks * size
    # Frequencies beyond all blocks have no rope key, and all of them goes without RoPE.
    w_k_GFD, passed_GFD = as_complex(inputs.w_k_GHD, dim=1).tensor_split([num_freqs], dim=1)
    num_groups = w_k_GFD.shape[0]
    gamma_NF = inputs.gamma_NF if use_gamma else torch.ones_like(inputs.gamma_NF)

    # S = G*K complex keys of each block, (KV head, frequency within the block).
    def blocks(x_GF: Tensor) -> Tensor:
        return x_GF.unflatten(1, (num_blocks, size)).transpose(0, 1).flatten(1, 2)

    def unblocks(x_BS: Tensor) -> Tensor:
        return x_BS.unflatten(1, (num_groups, size)).transpose(0, 1).flatten(1, 2)

    moment_BSS = _key_moments(inputs, num_freqs, blocks)
    turned_NF = (1 - gamma_NF.abs().square()).clamp_min(0) if use_gamma else torch.ones_like(gamma_NF.real)
    energy_NF = (inputs.q_energy_NF * turned_NF)[:, :num_freqs]
    energy_BS = blocks(energy_NF.unflatten(0, (num_groups, -1)).sum(1))
    d_BS = energy_BS.sqrt() if query_weights else torch.ones_like(energy_BS)
    kept_F = inputs.unscaled_F[:num_freqs] | (not unscaled_only)
    if not fold:
        kept_F = kept_F & (torch.arange(num_freqs, device=kept_F.device) % size == 0)
    kept_BS = blocks(kept_F.expand(num_groups, -1))
    d_BS = d_BS * kept_BS
    eigenvalues_BS, vectors_BSS = torch.linalg.eigh(d_BS[:, :, None] * moment_BSS * d_BS[:, None])
    top_B, u_BS = eigenvalues_BS[:, -1], _fix_phase(vectors_BSS[:, :, -1])
    # A block in which nothing turns (lambda = 0) goes wholly without RoPE.
    inverse_B = torch.where(top_B > 0, 1 / top_B, torch.zeros_like(top_B))
    pick_GF = unblocks(d_BS * u_BS.conj() * (top_B > 0)[:, None])
    rebuild_GF = unblocks((moment_BSS @ (d_BS * u_BS)[:, :, None])[:, :, 0] * inverse_B[:, None] * kept_BS)

    def gather(x_GFX: Tensor) -> Tensor:
        """Sum over KV heads and over each block's frequencies: (G, F, …) to (B, …)."""
        return x_GFX.sum(0).unflatten(0, (num_blocks, size)).sum(1)

    k_rope_BD = gather(pick_GF[:, :, None] * w_k_GFD)
    rest_GFD = w_k_GFD - rebuild_GF[:, :, None] * k_rope_BD.repeat_interleave(size, dim=0)
    rebuild_NF = rebuild_GF.repeat_interleave(inputs.num_heads // num_groups, dim=0)

    def rope_query(q_NFX: Tensor, shape: tuple[int, ...]) -> Tensor:
        turned_NFX = rebuild_NF.conj().view(*rebuild_NF.shape, *shape) * q_NFX[:, :num_freqs]
        return as_pairs(turned_NFX.unflatten(1, (num_blocks, size)).sum(2), dim=1)

    w_q_NFD = as_complex(inputs.w_q_NHD, dim=1)
    b_q_NF = None if inputs.b_q_NH is None else as_complex(inputs.b_q_NH, dim=1)
    b_k_GF = None if inputs.b_k_GH is None else as_complex(inputs.b_k_GH, dim=1)[:, :num_freqs]
    plain_F = inputs.rope_theta ** (
        -torch.arange(len(inputs.inv_freq_F), dtype=torch.float64) / len(inputs.inv_freq_F)
    )
    table_F = plain_F.to(inputs.inv_freq_F) if unscaled_only else inputs.inv_freq_F
    return ComplexSplit(
        k_rope_PD=as_pairs(k_rope_BD, dim=0),
        nope_GMD=as_pairs(torch.cat((rest_GFD, passed_GFD), dim=1), dim=1),
        q_rope_NPD=rope_query(w_q_NFD, (1,)),
        # conj(q) gamma n = conj(conj(gamma) q) n: the mean rotation moves into the query.
        q_nope_NMD=as_pairs(gamma_NF.conj()[:, :, None] * w_q_NFD, dim=1),
        k_rope_bias_P=None if b_k_GF is None else as_pairs(gather(pick_GF * b_k_GF), dim=0),
        q_rope_bias_NP=None if b_q_NF is None else rope_query(b_q_NF, ()),
        q_nope_bias_NM=None if b_q_NF is None else as_pairs(gamma_NF.conj() * b_q_NF, dim=1),
        inv_freq_F=table_F[:num_freqs:size],
    )


def block_size(kept_F: Tensor, num_blocks: int) -> int:
    """How many neighbouring frequencies a block holds, so that all blocks hold those that may keep RoPE.

    The most of them is F/B, halved as long as that is enough.
    """
    assert len(kept_F) % num_blocks == 0, f"{num_blocks} blocks do not divide {len(kept_F)} frequencies"
    size, needed = len(kept_F) // num_blocks, int(kept_F.nonzero().max()) + 1
    while size % 2 == 0 and size // 2 * num_blocks >= needed:
        size //= 2
    return size


def _key_moments(inputs: LayerInputs, num_freqs: int, blocks: Callable[[Tensor], Tensor]) -> Tensor:
    """E[k k^H] of each block's stacked complex keys, K's bias included: (B, S, S)."""
    w_BSD = blocks(as_complex(inputs.w_k_GHD, dim=1)[:, :num_freqs])
    moment_BSS = w_BSD @ inputs.c_DD.to(w_BSD.dtype) @ w_BSD.mH
    if inputs.b_k_GH is None:
        return moment_BSS
    b_BS = blocks(as_complex(inputs.b_k_GH, dim=1)[:, :num_freqs])
    mean_BS = w_BSD @ inputs.mean_D.to(w_BSD.dtype)
    cross_BSS = mean_BS[:, :, None] * b_BS[:, None].conj()
    return moment_BSS + cross_BSS + cross_BSS.mH + b_BS[:, :, None] * b_BS[:, None].conj()


def _fix_phase(u_BS: Tensor) -> Tensor:
    """The same eigenvectors with their largest entry real and positive: files are reproducible."""
    largest_B1 = u_BS.gather(1, u_BS.abs().argmax(1, keepdim=True))
    return u_BS * (largest_B1.conj() / largest_B1.abs().clamp_min(1e-300))
