"""Splitting keys into one shared rope key and a rest without RoPE, by complex PCA that commutes with RoPE.

A half-split pair (f, f + F) is the complex number k_f; RoPE multiplies it by e^(i theta_f t), so any complex
matrix across KV heads at one frequency commutes with it. Design, "Decoupling"; real rotations (RoRoPE) are
the special case in rope.py.
"""
# Shapes: D hidden_size, N query heads, G KV heads, n query heads of one KV head, H head_dim, F pairs of a
#         head (H/2; those that RoPE passes come last), B = P/2 blocks, K frequencies of a block, S stacked
#         keys of a block (G*K), P qk_rope_head_dim, M query and key width without RoPE (H), X any axes.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from care_mla.calibrate.attention import as_complex, as_pairs
from care_mla.decompose.layer_inputs import LayerInputs
from care_mla.decompose.rope_blocks import RopeBlocks, rope_blocks


@dataclass(frozen=True, kw_only=True)
class ComplexSplit:
    """Keys and queries split for the decoupled form; biases are None where the source has none.

    `nope_GMD` are the key rows that have lost RoPE, before any rank cut; the query rows that meet them and
    the shared rope key are `q_nope_NMD` and `q_rope_NPD`. `rope_kept_N` is, for each query head, the share of
    what rotation changes in its logits, sum_f E|q_h,f|^2 (1 - |gamma_h,f|^2) E|k_f|^2, that the rope key
    carries.
    """

    k_rope_PD: Tensor
    nope_GMD: Tensor
    q_rope_NPD: Tensor
    q_nope_NMD: Tensor
    k_rope_bias_P: Tensor | None
    q_rope_bias_NP: Tensor | None
    q_nope_bias_NM: Tensor | None
    inv_freq_F: Tensor
    rope_kept_N: Tensor


def decouple(
    inputs: LayerInputs,
    qk_rope_head_dim: int,
    *,
    use_gamma: bool = True,
    query_weights: bool = True,
    fold: bool = True,
    plain_table: bool = False,
) -> ComplexSplit:
    """The shared rope key that carries most of what rotation changes, and the rest with its mean rotation.

    Per block of frequencies that share a pair (`rope_blocks`), over the stacked complex keys k of all KV
    heads (G*K entries) with second moment M = E[k k^H] and weights d_g,f^2 = sum over the group's heads of
    E|q_h,f|^2 max(0, 1 - |gamma_h,f|^2): with (lambda, u) the top eigenpair of D M D, the rope key is
    k' = u^H D k, rebuilt as v k' with v = M D u / lambda, and rotated at the block's angle. What is left,
    k - v k', loses RoPE; head h sees it times gamma_h,f.

    Args:
        qk_rope_head_dim: P, twice the number of blocks.
        use_gamma: False takes gamma = 1 (and weights by query energy alone), for ablations.
        query_weights: False takes d = 1, for ablations.
        fold: False lets only the first frequency of each block have RoPE, for ablations.
        plain_table: whether the rope key turns by plain RoPE's angles where the source scales its own.
    """
    blocks = rope_blocks(inputs, qk_rope_head_dim // 2, plain_table=plain_table)
    if not fold:
        blocks.held_BK[:, 1:] = False
    w_k_GFD = as_complex(inputs.w_k_GHD, dim=1)
    num_groups = w_k_GFD.shape[0]
    gamma_NF = inputs.gamma_NF if use_gamma else torch.ones_like(inputs.gamma_NF)
    moment_BSS = _key_moments(inputs, blocks)
    turned_NF = (1 - gamma_NF.abs().square()).clamp_min(0) if use_gamma else torch.ones_like(gamma_NF.real)
    energy_BS = blocks.stack((inputs.q_energy_NF * turned_NF).unflatten(0, (num_groups, -1)).sum(1))
    d_BS = energy_BS.sqrt() if query_weights else blocks.stack(torch.ones_like(w_k_GFD[..., 0].real))
    eigenvalues_BS, vectors_BSS = torch.linalg.eigh(d_BS[:, :, None] * moment_BSS * d_BS[:, None])
    top_B, u_BS = eigenvalues_BS[:, -1], _fix_phase(vectors_BSS[:, :, -1])
    # A block in which nothing turns (lambda = 0) goes wholly without RoPE.
    inverse_B = torch.where(top_B > 0, 1 / top_B, torch.zeros_like(top_B))
    pick_BS = d_BS * u_BS.conj() * (top_B > 0)[:, None]
    rebuild_BS = (moment_BSS @ (d_BS * u_BS)[:, :, None])[:, :, 0] * inverse_B[:, None]

    k_rope_BD = (pick_BS[:, None] @ blocks.stack(w_k_GFD))[:, 0]
    rest_GFD = w_k_GFD - blocks.unstack(rebuild_BS[:, :, None] * k_rope_BD[:, None], w_k_GFD)
    group_size = inputs.num_heads // num_groups

    def rope_query(q_NFX: Tensor) -> Tensor:
        """conj(v) q summed over each block's frequencies: (N, P, X)."""
        heads = [blocks.stack(q_GFX) for q_GFX in q_NFX.unflatten(0, (-1, group_size)).unbind(1)]
        q_BSnX = torch.stack(heads, dim=2) * rebuild_BS.conj()[:, :, None, None]
        q_BGnX = q_BSnX.unflatten(1, (num_groups, -1)).sum(2)
        return as_pairs(q_BGnX.flatten(1, 2).transpose(0, 1), dim=1)

    w_q_NFD = as_complex(inputs.w_q_NHD, dim=1)
    b_q_NF = None if inputs.b_q_NH is None else as_complex(inputs.b_q_NH, dim=1)
    k_bias_P = None
    if inputs.b_k_GH is not None:
        b_BS = blocks.stack(as_complex(inputs.b_k_GH, dim=1))
        k_bias_P = as_pairs((pick_BS * b_BS).sum(1), dim=0)
    return ComplexSplit(
        k_rope_PD=as_pairs(k_rope_BD, dim=0),
        nope_GMD=as_pairs(rest_GFD, dim=1),
        q_rope_NPD=rope_query(w_q_NFD),
        # conj(q) gamma n = conj(conj(gamma) q) n: the mean rotation moves into the query.
        q_nope_NMD=as_pairs(gamma_NF.conj()[:, :, None] * w_q_NFD, dim=1),
        k_rope_bias_P=k_bias_P,
        q_rope_bias_NP=None if b_q_NF is None else rope_query(b_q_NF[..., None])[..., 0],
        q_nope_bias_NM=None if b_q_NF is None else as_pairs(gamma_NF.conj() * b_q_NF, dim=1),
        inv_freq_F=blocks.inv_freq_B,
        # E|v k'|^2 = lambda |v|^2, since k' = u^H D k has the second moment lambda.
        rope_kept_N=_rope_kept(
            inputs,
            blocks.unstack((top_B[:, None] * rebuild_BS.abs().square())[..., None], w_k_GFD[..., :1].real),
        ),
    )


def _rope_kept(inputs: LayerInputs, carried_GF1: Tensor) -> Tensor:
    """By query head, the share of its rotating energy that is in keys of these second moments: (N,)."""
    key_GF = inputs.key_moment().diagonal().unflatten(0, (inputs.num_kv_heads, 2, -1)).sum(1)
    turning_NF = inputs.q_energy_NF * (1 - inputs.gamma_NF.abs().square()).clamp_min(0)
    turning_GnF = turning_NF.unflatten(0, (inputs.num_kv_heads, -1))
    carried_N = (turning_GnF * carried_GF1[:, None, :, 0]).sum(-1).flatten()
    whole_N = (turning_GnF * key_GF[:, None]).sum(-1).flatten()
    return torch.where(whole_N > 0, carried_N / whole_N, torch.ones_like(whole_N))


def _key_moments(inputs: LayerInputs, blocks: RopeBlocks) -> Tensor:
    """E[k k^H] of each block's stacked complex keys, K's bias included: (B, S, S)."""
    w_BSD = blocks.stack(as_complex(inputs.w_k_GHD, dim=1))
    moment_BSS = w_BSD @ inputs.c_DD.to(w_BSD.dtype) @ w_BSD.mH
    if inputs.b_k_GH is None:
        return moment_BSS
    b_BS = blocks.stack(as_complex(inputs.b_k_GH, dim=1))
    mean_BS = w_BSD @ inputs.mean_D.to(w_BSD.dtype)
    cross_BSS = mean_BS[:, :, None] * b_BS[:, None].conj()
    return moment_BSS + cross_BSS + cross_BSS.mH + b_BS[:, :, None] * b_BS[:, None].conj()


def _fix_phase(u_BS: Tensor) -> Tensor:
    """The same eigenvectors with their largest entry real and positive: files are reproducible."""
    largest_B1 = u_BS.gather(1, u_BS.abs().argmax(1, keepdim=True))
    return u_BS * (largest_B1.conj() / largest_B1.abs().clamp_min(1e-300))
