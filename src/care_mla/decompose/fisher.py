"""Our default factor: one joint latent for keys and values, weighted by what the loss feels at each of them.

Minimises E|G0^(1/2) (M0 - up down) x|^2, the second-order loss with the input covariance C and the Fisher
information G0 as Kronecker factors. With G0 = I this is `joint`. Design, "Factor".
"""
# Shapes: D hidden_size, G KV heads, H head_dim, M qk_nope_head_dim, R kv_lora_rank, O = G*M + G*H stacked
#         rows.

from __future__ import annotations

import torch
from torch import Tensor

from care_mla.decompose.baselines import exact_rope_layer
from care_mla.decompose.care import Factor, care_factor
from care_mla.decompose.decouple import ComplexSplit, decouple
from care_mla.decompose.layer_inputs import Decomposition, LayerInputs, damp
from care_mla.factors import LatentLayer

# How much of the covariance is weighted by what the loss feels; 0.1 to 0.5 give the same within 1 %.
FELT_SHARE = 0.3


def damp_blocks(fisher_OO: Tensor, num_key_rows: int, damping: float) -> Tensor:
    """Add `damping` times the mean diagonal of the key block and of the value block, each to its own rows.

    Their scales differ by 5 to 1000 times, so one scalar for both drowns one of them.
    """
    diagonal_O = fisher_OO.diagonal()
    added_O = torch.empty_like(diagonal_O)
    added_O[:num_key_rows] = diagonal_O[:num_key_rows].mean()
    added_O[num_key_rows:] = diagonal_O[num_key_rows:].mean()
    return fisher_OO + damping * torch.diag(added_O)


def felt_covariance(inputs: LayerInputs) -> Tensor:
    """The damped covariance in which tokens that the loss feels count more.

    The Fisher information is E[(g g^T) x (x x^T)], and C x G0 is its Kronecker product only if gradients and
    inputs are independent. They are not: few tokens (an attention sink above all) have large gradients.
    Weighting x x^T by |g|^2 is the first step of the iteration for the nearest Kronecker product (Van Loan
    and Pitsianis 1993); the share of plain C keeps rare inputs from being forgotten.
    """
    return damp((1 - FELT_SHARE) * inputs.c_DD + FELT_SHARE * inputs.felt_c_DD, inputs.damping)


def weighted_factor(m_OD: Tensor, c_DD: Tensor, fisher_OO: Tensor | None) -> Factor:
    """Factor M0 under covariance C (inputs) and metric G0 (outputs); no inverse or root of C is needed.

    Keeps the top eigenvectors U of G0^(1/2) M0 C M0^T G0^(1/2): down = U^T G0^(1/2) M0, up = G0^(-1/2) U.
    `fisher_OO` must be positive definite (damp it); None is G0 = I.
    """
    if fisher_OO is None:
        return care_factor(m_OD, c_DD)
    values_O, vectors_OO = torch.linalg.eigh(fisher_OO)
    assert values_O[0] > 0, f"undamped Fisher information: smallest eigenvalue {values_O[0]:.3g}"
    root_OO = (vectors_OO * values_O.sqrt()) @ vectors_OO.T
    inverse_root_OO = (vectors_OO / values_O.sqrt()) @ vectors_OO.T
    factor = care_factor(root_OO @ m_OD, c_DD)
    return Factor(inverse_root_OO @ factor.up_OK, factor.down_KD, factor.spectrum_K)


def exact_fisher(inputs: LayerInputs) -> Decomposition:
    """Exact-rope: M0 = [W_K; W_V], G0 at the key before RoPE."""
    num_key_rows = inputs.num_kv_heads * inputs.head_dim
    m_OD = torch.cat([inputs.w_k_GHD.flatten(0, 1), inputs.w_v_GHD.flatten(0, 1)])
    fisher_OO = damp_blocks(inputs.fisher_exact_OO, num_key_rows, inputs.fisher_damping)
    factor = weighted_factor(m_OD, felt_covariance(inputs), fisher_OO)

    def cut(ranks: tuple[int, ...]) -> LatentLayer:
        (rank,) = ranks
        assert 0 < rank <= len(factor.spectrum_K), (rank, len(factor.spectrum_K))
        return exact_rope_layer(inputs, factor.down_KD[:rank], *factor.up_OK[:, :rank].chunk(2))

    return Decomposition(spectra=(factor.spectrum_K,), cut=cut)


def decoupled_fisher(
    inputs: LayerInputs, *, qk_rope_head_dim: int, plain_table: bool = False
) -> Decomposition:
    """Decoupled: M0 = [N W_K; W_V], G0 at the key that has lost RoPE."""
    split = decouple(inputs, qk_rope_head_dim, plain_table=plain_table)
    num_key_rows = inputs.num_kv_heads * inputs.head_dim
    fisher_OO = damp_blocks(inputs.fisher_nope_OO, num_key_rows, inputs.fisher_damping)
    return decoupled_latent(inputs, split, felt_covariance(inputs), fisher_OO)


def decoupled_joint(
    inputs: LayerInputs, *, qk_rope_head_dim: int, plain_table: bool = False
) -> Decomposition:
    """As `decoupled_fisher` with G0 = I: the complex decoupling alone."""
    split = decouple(inputs, qk_rope_head_dim, plain_table=plain_table)
    return decoupled_latent(inputs, split, inputs.damped_c_DD, None)


def decoupled_latent(
    inputs: LayerInputs, split: ComplexSplit, c_DD: Tensor, fisher_OO: Tensor | None
) -> Decomposition:
    """One joint latent for NoPE keys and values beside the shared rope key."""
    num_groups, nope_dim, _ = split.nope_GMD.shape
    m_OD = torch.cat([split.nope_GMD.flatten(0, 1), inputs.w_v_GHD.flatten(0, 1)])
    factor = weighted_factor(m_OD, c_DD, fisher_OO)

    def cut(ranks: tuple[int, ...]) -> LatentLayer:
        (rank,) = ranks
        assert 0 < rank <= len(factor.spectrum_K), (rank, len(factor.spectrum_K))
        up_k_OR, up_v_OR = factor.up_OK[:, :rank].tensor_split([num_groups * nope_dim])
        return LatentLayer(
            form="decoupled",
            down_RD=factor.down_KD[:rank],
            up_k_GMR=up_k_OR.unflatten(0, (num_groups, -1)),
            up_v_GHR=up_v_OR.unflatten(0, (num_groups, -1)),
            q_rope_NPD=split.q_rope_NPD,
            q_nope_NMD=split.q_nope_NMD,
            k_rope_JPD=split.k_rope_PD[None],
            k_rope_bias_JP=None if split.k_rope_bias_P is None else split.k_rope_bias_P[None],
            q_rope_bias_NP=split.q_rope_bias_NP,
            q_nope_bias_NM=split.q_nope_bias_NM,
            v_bias_GH=inputs.b_v_GH,
            inv_freq_JF=split.inv_freq_F[None],
        )

    return Decomposition(spectra=(factor.spectrum_K,), cut=cut, rope_kept_N=split.rope_kept_N)
