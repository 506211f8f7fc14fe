"""Methods of the decoupled form by other papers: TransMLA, CARE after its RoPE split, X-EcoMLA.

RoRoPE (arXiv 2502.07864) turns the keys of all KV heads so that few directions hold most of their energy at
each frequency: those become the one rope key, the others lose RoPE and go into the latent with the values.
Reads `LayerInputs`, returns `Decomposition`s.
"""
# Shapes: D hidden_size, N query heads, G KV heads, H head_dim, P qk_rope_head_dim, F frequencies (H/2),
#         R kv_lora_rank, O key rows of all KV heads (G*H), X key rows without RoPE (O - P), S stacked rows
#         (X + O), B frequency blocks, E directions in a block (G * freqfold), K components of a factor.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from care_mla.decompose.care import (
    Factor,
    care_factor,
    column_signs,
    covariance_factor,
    make_factor,
    no_root_factor,
    weight_factor,
)
from care_mla.decompose.layer_inputs import Decomposition, LayerInputs
from care_mla.errors import OptionError
from care_mla.factors import LatentLayer


@dataclass(frozen=True, kw_only=True)
class RopeSplit:
    """An orthonormal basis of the keys of all KV heads: directions that keep RoPE, and the rest.

    Columns of `rope_OP` are in half-split order (pair j is columns j and j + P/2) and pair j turns by
    `inv_freq_JF[0, j]`.
    """

    rope_OP: Tensor
    nope_OX: Tensor
    inv_freq_JF: Tensor

    def stacked_rows(self, inputs: LayerInputs) -> Tensor:
        """What the latent must carry: [keys without RoPE; values], (S, D)."""
        return torch.cat([self.nope_OX.T @ inputs.w_k_GHD.flatten(0, 1), inputs.w_v_GHD.flatten(0, 1)])


def rorope_split(inputs: LayerInputs, qk_rope_head_dim: int, freqfold: int) -> RopeSplit:
    """TransMLA's RoRoPE with FreqFold and collapse.

    Frequencies are taken in blocks of `freqfold` neighbours. In a block, the (KV head, frequency) coordinates
    of the keys before RoPE, real and imaginary parts counted as separate samples, are turned by the
    eigenvectors of their second moment. One real rotation for both parts commutes with RoPE if the
    frequencies are equal: exact at freqfold 1, approximate above. With c = H/P, the leading freqfold/c
    directions of a block keep RoPE, at every c-th frequency of the block in descending order of energy.

    Args:
        inputs: the layer; the bias of the keys counts in their moment, since it turns with RoPE.
        qk_rope_head_dim: P, an even divisor of H.
        freqfold: a multiple of H/P that divides H/2.

    Raises:
        OptionError: P or freqfold does not divide as above.
    """
    num_heads, num_freq = inputs.num_kv_heads, inputs.rotary_dim // 2
    collapse = _collapse(inputs, qk_rope_head_dim)
    if freqfold < 1 or freqfold % collapse or num_freq % freqfold:
        fits = [fold for fold in range(collapse, num_freq + 1, collapse) if num_freq % fold == 0]
        raise OptionError(
            f"freqfold {freqfold}: with {inputs.rotary_dim} rotated dimensions and qk_rope_head_dim "
            f"{qk_rope_head_dim}, "
            f"TransMLA keeps one frequency of {collapse}, so its blocks must hold a multiple of {collapse} "
            f"frequencies and divide {num_freq}. Choose one of {fits}."
        )
    by_pair = (num_heads, 2, inputs.head_dim // 2)
    moment = inputs.key_moment().reshape(*by_pair, *by_pair)[:, :, :num_freq, :, :, :num_freq]
    moment_GFGF = moment[:, 0, :, :, 0] + moment[:, 1, :, :, 1]
    blocks = moment_GFGF.unflatten(3, (-1, freqfold)).unflatten(1, (-1, freqfold))
    moment_BEE = blocks.diagonal(dim1=1, dim2=4).movedim(-1, 0).flatten(3, 4).flatten(1, 2)
    u_BEE = torch.linalg.eigh(moment_BEE).eigenvectors.flip(-1)
    u_BEE = torch.stack([u_EE * column_signs(u_EE) for u_EE in u_BEE])

    # rotation[g, half, block, f, half', block', e]: the same turn for both halves, block by block.
    num_blocks = len(u_BEE)
    rotation = u_BEE.new_zeros(num_heads, 2, num_blocks, freqfold, 2, num_blocks, u_BEE.shape[-1])
    u_BGfE = u_BEE.unflatten(1, (num_heads, freqfold))
    for half in range(2):
        for block in range(num_blocks):
            rotation[:, half, block, :, half, block] = u_BGfE[block]
    # Rows of pairs that RoPE passes are directions without RoPE as they are.
    turned_GH = torch.arange(inputs.head_dim // 2).expand(by_pair) < num_freq
    turned_O = turned_GH.flatten().to(u_BEE.device)
    eye_OO = torch.eye(len(turned_O), dtype=u_BEE.dtype, device=u_BEE.device)
    rotation = torch.tensordot(eye_OO[:, turned_O], rotation.flatten(0, 3), dims=1)
    kept = freqfold // collapse
    return RopeSplit(
        rope_OP=rotation[..., :kept].flatten(1),
        nope_OX=torch.cat([rotation[..., kept:].flatten(1), eye_OO[:, ~turned_O]], dim=1),
        inv_freq_JF=inputs.inv_freq_F[None, :num_freq:collapse],
    )


def transmla(
    inputs: LayerInputs, *, qk_rope_head_dim: int, freqfold: int, balance: float = 1.0
) -> Decomposition:
    """TransMLA (arXiv 2502.07864): RoRoPE split, K/V balancing, then the PCA of [K_nope / rho; V].

    rho = (mean root mean square of the channels of K_nope) / (balance * that of V) makes keys and values
    weigh the same. Two differences from the official code, neither of which shows without biases: biases of
    values are exact instead of passing through the latent (those of keys without RoPE cancel in the softmax),
    so that the moment leaves them out; and V's channels all count in rho, where that code skips the first P
    of them.
    """
    c_DD = inputs.damped_c_DD
    split = rorope_split(inputs, qk_rope_head_dim, freqfold)
    m_SD = split.stacked_rows(inputs)
    num_nope = split.nope_OX.shape[1]
    rms_S = ((m_SD @ c_DD) * m_SD).sum(dim=1).clamp_min(0).sqrt()  # below 0: rounding
    weight_S = torch.ones_like(rms_S)
    if num_nope:  # with one KV head and P = H no key row is left to balance
        weight_S[:num_nope] = rms_S[num_nope:].mean() * balance / rms_S[:num_nope].mean()
    eigen = covariance_factor(weight_S[:, None] * m_SD, c_DD)
    up_SK = eigen.up_OO / weight_S[:, None]
    return _decoupled(inputs, split, make_factor(up_SK, eigen.up_OO.T @ (weight_S[:, None] * m_SD), c_DD))


def decoupled_care_u(inputs: LayerInputs, *, qk_rope_head_dim: int, freqfold: int) -> Decomposition:
    """The paper's pipeline: TransMLA's RoPE split, then CARE's factor of [K_nope; V] without balancing.

    With ranks that differ by layer this is CARE-E.
    """
    split = rorope_split(inputs, qk_rope_head_dim, freqfold)
    return _decoupled(inputs, split, care_factor(split.stacked_rows(inputs), inputs.damped_c_DD))


def decoupled_care_c(inputs: LayerInputs, *, qk_rope_head_dim: int, freqfold: int) -> Decomposition:
    """As `decoupled_care_u`, with CARE's factor without the square root."""
    split = rorope_split(inputs, qk_rope_head_dim, freqfold)
    return _decoupled(inputs, split, no_root_factor(split.stacked_rows(inputs), inputs.damped_c_DD))


def x_ecomla(inputs: LayerInputs, *, qk_rope_head_dim: int) -> Decomposition:
    """X-EcoMLA's initialisation (arXiv 2503.11132): weights alone, and meant to be healed.

    Joint SVD of [W_K; W_V]; repeating KV heads for the query heads first, as the source does, scales the
    singular values and changes nothing else. The first H - P rows of each key head are read from the latent
    without RoPE. The rope key is the last P rows of the mean key head, with DeepSeek's interleaved pairs:
    rows H - P + 2i and H - P + 2i + 1 turn by theta^(-2i/P), which is every (H/P)-th frequency of the source.
    So RoPE pairs rows that were no pairs before, and gives them other frequencies; queries are sliced in the
    same way. Here the pairs are written in half-split order, which is the same function. Unlike the source,
    queries are not compressed, and biases of values are exact. At P = H keys do not read the latent at all.

    The spectrum counts the rows that are read; it may go up and down.
    """
    head_dim = inputs.head_dim
    collapse = _collapse(inputs, qk_rope_head_dim)
    num_nope = head_dim - qk_rope_head_dim
    rows_P = torch.cat([torch.arange(num_nope, head_dim, 2), torch.arange(num_nope + 1, head_dim, 2)])
    factor = weight_factor(torch.cat([inputs.w_k_GHD, inputs.w_v_GHD]).flatten(0, 1), inputs.damped_c_DD)
    up_k_GHK, up_v_GHK = factor.up_OK.unflatten(0, (-1, head_dim)).chunk(2)
    up_k_GMK = up_k_GHK[:, :num_nope]
    read_SK = torch.cat([up_k_GMK.flatten(0, 1), up_v_GHK.flatten(0, 1)])
    spectrum_K = make_factor(read_SK, factor.down_KD, inputs.damped_c_DD).spectrum_K
    k_bias_GH = inputs.b_k_GH

    def cut(ranks: tuple[int, ...]) -> LatentLayer:
        (rank,) = ranks
        assert 0 < rank <= len(spectrum_K), (rank, len(spectrum_K))
        return LatentLayer(
            form="decoupled",
            down_RD=factor.down_KD[:rank],
            up_k_GMR=up_k_GMK[..., :rank],
            up_v_GHR=up_v_GHK[..., :rank],
            q_nope_NMD=inputs.w_q_NHD[:, :num_nope],
            q_rope_NPD=inputs.w_q_NHD[:, rows_P],
            k_rope_JPD=inputs.w_k_GHD.mean(dim=0)[None, rows_P],
            inv_freq_JF=inputs.inv_freq_F[None, : inputs.rotary_dim // 2 : collapse],
            q_nope_bias_NM=None if inputs.b_q_NH is None else inputs.b_q_NH[:, :num_nope],
            q_rope_bias_NP=None if inputs.b_q_NH is None else inputs.b_q_NH[:, rows_P],
            k_rope_bias_JP=None if k_bias_GH is None else k_bias_GH.mean(dim=0)[None, rows_P],
            v_bias_GH=inputs.b_v_GH,
        )

    return Decomposition(spectra=(spectrum_K,), cut=cut)


def decoupled_layer(inputs: LayerInputs, split: RopeSplit, down_RD: Tensor, up_SR: Tensor) -> LatentLayer:
    """The decoupled layer whose latent rebuilds the rows of `split.stacked_rows`; M = H.

    Keys without RoPE are turned back to the source's coordinates, so that the queries there are the source's
    own.
    """
    num_nope = split.nope_OX.shape[1]
    heads = (inputs.num_kv_heads, inputs.head_dim)
    group_size = inputs.num_heads // inputs.num_kv_heads
    rope_NHP = split.rope_OP.unflatten(0, heads).repeat_interleave(group_size, dim=0)
    b_q_NH, b_k_GH = inputs.b_q_NH, inputs.b_k_GH
    return LatentLayer(
        form="decoupled",
        down_RD=down_RD,
        up_k_GMR=(split.nope_OX @ up_SR[:num_nope]).unflatten(0, heads),
        up_v_GHR=up_SR[num_nope:].unflatten(0, heads),
        q_nope_NMD=inputs.w_q_NHD,
        q_rope_NPD=rope_NHP.mT @ inputs.w_q_NHD,
        k_rope_JPD=(split.rope_OP.T @ inputs.w_k_GHD.flatten(0, 1))[None],
        inv_freq_JF=split.inv_freq_JF,
        q_nope_bias_NM=b_q_NH,
        q_rope_bias_NP=None if b_q_NH is None else (rope_NHP.mT @ b_q_NH[..., None])[..., 0],
        k_rope_bias_JP=None if b_k_GH is None else (split.rope_OP.T @ b_k_GH.flatten())[None],
        v_bias_GH=inputs.b_v_GH,
    )


def _decoupled(inputs: LayerInputs, split: RopeSplit, factor: Factor) -> Decomposition:
    def cut(ranks: tuple[int, ...]) -> LatentLayer:
        (rank,) = ranks
        assert 0 < rank <= len(factor.spectrum_K), (rank, len(factor.spectrum_K))
        return decoupled_layer(inputs, split, factor.down_KD[:rank], factor.up_OK[:, :rank])

    return Decomposition(spectra=(factor.spectrum_K,), cut=cut)


def _collapse(inputs: LayerInputs, qk_rope_head_dim: int) -> int:
    """How many of the head's frequencies there are for each of the rope key's, checked."""
    turned = inputs.rotary_dim
    if qk_rope_head_dim < 2 or qk_rope_head_dim % 2 or turned % qk_rope_head_dim:
        fits = [width for width in range(2, turned + 1, 2) if turned % width == 0]
        raise OptionError(
            f"--qk-rope-head-dim {qk_rope_head_dim}: the rope key keeps every ({turned} / width)-th "
            f"frequency, and the {turned} dimensions that RoPE turns cannot be divided so. Choose one of "
            f"{fits}."
        )
    return turned // qk_rope_head_dim
