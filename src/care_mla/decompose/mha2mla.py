"""MHA2MLA (arXiv 2502.14837), the partial-rope form: every KV head keeps RoPE on its own few pairs.

Pairs are chosen by their 2-norms; the other key rows and the values go into the latent by a truncated SVD of
the weights. Reads `LayerInputs`, returns `Decomposition`s. Caches G*P + R values per token.
"""
# Shapes: D hidden_size, N query heads, G KV heads, H head_dim, P qk_rope_head_dim, M rows without RoPE
#         (H - P), F frequencies (H/2), C chosen pairs (P/2), R kv_lora_rank, S stacked rows (G*M + G*H),
#         K components of a factor.

from __future__ import annotations

import torch
from torch import Tensor

from care_mla.decompose.care import Factor, interleave, weight_factor
from care_mla.decompose.layer_inputs import Decomposition, LayerInputs
from care_mla.errors import OptionError
from care_mla.factors import LatentLayer


def mha2mla_joint(inputs: LayerInputs, *, qk_rope_head_dim: int) -> Decomposition:
    """One latent: [ [W_K without RoPE; W_V] ]_r."""
    pairs_GC = choose_pairs(inputs, qk_rope_head_dim)
    _, nope_GM = _rows(pairs_GC, inputs.head_dim)
    m_SD = torch.cat([_take(inputs.w_k_GHD, nope_GM).flatten(0, 1), inputs.w_v_GHD.flatten(0, 1)])
    return _partial_rope(inputs, pairs_GC, weight_factor(m_SD, inputs.damped_c_DD))


def mha2mla_split(inputs: LayerInputs, *, qk_rope_head_dim: int) -> Decomposition:
    """Keys and values factored apart, the rank shared evenly.

    An odd one goes to the keys, what they cannot use to the values. One spectrum, as in the joint
    variant, so that `cut((R,))` means R cached values in both.
    """
    pairs_GC = choose_pairs(inputs, qk_rope_head_dim)
    _, nope_GM = _rows(pairs_GC, inputs.head_dim)
    c_DD = inputs.damped_c_DD
    keys = weight_factor(_take(inputs.w_k_GHD, nope_GM).flatten(0, 1), c_DD)
    values = weight_factor(inputs.w_v_GHD.flatten(0, 1), c_DD)
    return _partial_rope(inputs, pairs_GC, interleave([keys, values], c_DD))


def choose_pairs(inputs: LayerInputs, qk_rope_head_dim: int) -> Tensor:
    """The P/2 RoPE pairs of each KV head with the largest sqrt(E|q|^2 E|k|^2), in the source's order: (G, C).

    The mean over the head's query heads counts. MHA2MLA takes E|q| E|k|, mean norms instead of root mean
    squares.

    Raises:
        OptionError: P is odd, or leaves no pair on one of the two sides.
    """
    head_dim, num_heads = inputs.head_dim, inputs.num_kv_heads
    if qk_rope_head_dim % 2 or not 0 < qk_rope_head_dim < head_dim or qk_rope_head_dim > inputs.rotary_dim:
        raise OptionError(
            f"--qk-rope-head-dim {qk_rope_head_dim}: MHA2MLA keeps whole RoPE pairs of heads that are "
            f"{head_dim} wide, and factors the others, so both must remain. "
            f"Choose an even number from 2 to {min(inputs.rotary_dim, head_dim - 2)}."
        )
    k_norm_GF = inputs.key_moment().diagonal().reshape(num_heads, 2, -1).sum(dim=1).sqrt()
    q_norm_GF = inputs.q_energy_NF.sqrt().unflatten(0, (num_heads, -1)).mean(dim=1)
    # A stable sort gives ties to the higher frequency on every machine; pairs that RoPE passes do not stand.
    norm_GF = (q_norm_GF * k_norm_GF)[:, : inputs.rotary_dim // 2]
    order_GF = norm_GF.argsort(dim=1, descending=True, stable=True)
    return order_GF[:, : qk_rope_head_dim // 2].sort(dim=1).values


def _partial_rope(inputs: LayerInputs, pairs_GC: Tensor, factor: Factor) -> Decomposition:
    num_heads, head_dim = inputs.num_kv_heads, inputs.head_dim
    rope_GP, nope_GM = _rows(pairs_GC, head_dim)
    group_size = inputs.num_heads // num_heads
    rope_NP, nope_NM = (rows.repeat_interleave(group_size, dim=0) for rows in (rope_GP, nope_GM))
    num_nope = nope_GM.numel()
    up_k_GMK = factor.up_OK[:num_nope].unflatten(0, nope_GM.shape)
    up_v_GHK = factor.up_OK[num_nope:].unflatten(0, (num_heads, head_dim))

    def cut(ranks: tuple[int, ...]) -> LatentLayer:
        (rank,) = ranks
        assert 0 < rank <= len(factor.spectrum_K), (rank, len(factor.spectrum_K))
        return LatentLayer(
            form="partial-rope",
            down_RD=factor.down_KD[:rank],
            up_k_GMR=up_k_GMK[..., :rank],
            up_v_GHR=up_v_GHK[..., :rank],
            q_nope_NMD=_take(inputs.w_q_NHD, nope_NM),
            q_rope_NPD=_take(inputs.w_q_NHD, rope_NP),
            k_rope_JPD=_take(inputs.w_k_GHD, rope_GP),
            inv_freq_JF=inputs.inv_freq_F[pairs_GC],
            q_nope_bias_NM=None if inputs.b_q_NH is None else inputs.b_q_NH.gather(1, nope_NM),
            q_rope_bias_NP=None if inputs.b_q_NH is None else inputs.b_q_NH.gather(1, rope_NP),
            k_rope_bias_JP=None if inputs.b_k_GH is None else inputs.b_k_GH.gather(1, rope_GP),
            v_bias_GH=inputs.b_v_GH,
        )

    return Decomposition(spectra=(factor.spectrum_K,), cut=cut)


def _rows(pairs_GC: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Rows of each head that keep RoPE (G, P), in half-split order, and the others (G, M)."""
    num_freq = head_dim // 2
    chosen_GF = torch.zeros(len(pairs_GC), num_freq, dtype=torch.bool, device=pairs_GC.device)
    chosen_GF = chosen_GF.scatter(1, pairs_GC, True)
    others_GC = (~chosen_GF).nonzero()[:, 1].reshape(len(pairs_GC), num_freq - pairs_GC.shape[1])
    return torch.cat([pairs_GC, pairs_GC + num_freq], dim=1), torch.cat(
        [others_GC, others_GC + num_freq], dim=1
    )


def _take(w_GHD: Tensor, rows_GM: Tensor) -> Tensor:
    """Each head's own rows: (G, M, D)."""
    return w_GHD.gather(1, rows_GM[..., None].expand(*rows_GM.shape, w_GHD.shape[-1]))
