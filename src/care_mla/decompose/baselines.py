"""Methods of the exact-rope form: keys are rebuilt from the latent and rotated at their own positions.

Every method reads `LayerInputs`, uses the same damped C and returns a `Decomposition`; they differ in the
factor alone. Biases stay outside the factors and are exact.
"""
# Shapes: D hidden_size, N query heads, G KV heads, H head_dim, R kv_lora_rank, O rows of a projection
#         (G*H for keys or values, 2*G*H for [keys; values]), K components of a factor.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from care_mla.decompose.care import (
    Factor,
    care_factor,
    column_signs,
    interleave,
    make_factor,
    no_root_factor,
    scaled_factor,
    weight_factor,
)
from care_mla.decompose.layer_inputs import Decomposition, LayerInputs
from care_mla.errors import OptionError
from care_mla.factors import LatentLayer

PALU_GROUP_SIZE = 4


def svd(inputs: LayerInputs) -> Decomposition:
    """Keys and values apart, [W]_r: the truncated SVD of the weights, blind to the inputs."""
    c_DD = inputs.damped_c_DD
    return separate_latents(inputs, lambda w_OD: weight_factor(w_OD, c_DD))


def asvd(inputs: LayerInputs, *, alpha: float = 0.5) -> Decomposition:
    """ASVD (arXiv 2312.05821): [W S]_r S^(-1) with S = diag(E|x_j|^alpha)."""
    c_DD, scale_D = inputs.damped_c_DD, inputs.mean_abs_D**alpha
    return separate_latents(inputs, lambda w_OD: scaled_factor(w_OD, scale_D, c_DD))


def svd_llm(inputs: LayerInputs) -> Decomposition:
    """SVD-LLM (arXiv 2403.07378): [W L]_r L^(-1) with L L^T = C.

    Raises:
        OptionError: C is not positive definite.
    """
    c_DD = inputs.damped_c_DD
    chol_DD = _cholesky(c_DD, inputs)
    return separate_latents(inputs, lambda w_OD: _whitened_factor(w_OD, chol_DD, c_DD))


def care_u(inputs: LayerInputs) -> Decomposition:
    """CARE (arXiv 2603.17946, section 3.2): [W C^(1/2)]_r C^(-1/2), by the eigenvectors of W C W^T.

    With ranks that differ by layer this is CARE-E.
    """
    c_DD = inputs.damped_c_DD
    return separate_latents(inputs, lambda w_OD: care_factor(w_OD, c_DD))


def care_c(inputs: LayerInputs) -> Decomposition:
    """CARE without the square root: [W C]_r C^(-1), which minimises ||(W - What) C||_F."""
    c_DD = inputs.damped_c_DD
    return separate_latents(inputs, lambda w_OD: no_root_factor(w_OD, c_DD))


def palu(inputs: LayerInputs) -> Decomposition:
    """Palu's G-LRD (arXiv 2407.21118): SVD-LLM's factor for each group of 4 heads, with even ranks.

    Groups hold the largest number of heads up to 4 that divides the KV heads. The remainder of a rank that
    does not divide by the groups goes to the first ones.

    Raises:
        OptionError: C is not positive definite.
    """
    c_DD = inputs.damped_c_DD
    chol_DD = _cholesky(c_DD, inputs)
    num_heads = inputs.num_kv_heads
    group_size = max(size for size in range(1, PALU_GROUP_SIZE + 1) if num_heads % size == 0)

    def factorize(w_OD: Tensor) -> Factor:
        groups = w_OD.chunk(num_heads // group_size)
        return interleave([_whitened_factor(group_OD, chol_DD, c_DD) for group_OD in groups], c_DD)

    return separate_latents(inputs, factorize)


def joint(inputs: LayerInputs) -> Decomposition:
    """One latent for keys and values: the eigenvectors of [W_K; W_V] C [W_K; W_V]^T."""
    m_OD = torch.cat([inputs.w_k_GHD.flatten(0, 1), inputs.w_v_GHD.flatten(0, 1)])
    factor = care_factor(m_OD, inputs.damped_c_DD)

    def cut(ranks: tuple[int, ...]) -> LatentLayer:
        (rank,) = ranks
        assert 0 < rank <= len(factor.spectrum_K), (rank, len(factor.spectrum_K))
        up_k_OR, up_v_OR = factor.up_OK[:, :rank].chunk(2)
        return exact_rope_layer(inputs, factor.down_KD[:rank], up_k_OR, up_v_OR)

    return Decomposition(spectra=(factor.spectrum_K,), cut=cut)


def separate_latents(inputs: LayerInputs, factorize: Callable[[Tensor], Factor]) -> Decomposition:
    """One latent for keys and one for values: two spectra, and `cut((rank_k, rank_v))`."""
    keys = factorize(inputs.w_k_GHD.flatten(0, 1))
    values = factorize(inputs.w_v_GHD.flatten(0, 1))

    def cut(ranks: tuple[int, ...]) -> LatentLayer:
        rank_k, rank_v = ranks
        assert 0 <= rank_k <= len(keys.spectrum_K), (rank_k, len(keys.spectrum_K))
        assert 0 <= rank_v <= len(values.spectrum_K), (rank_v, len(values.spectrum_K))
        down_RD = torch.cat([keys.down_KD[:rank_k], values.down_KD[:rank_v]])
        up_k_OR = torch.nn.functional.pad(keys.up_OK[:, :rank_k], (0, rank_v))
        up_v_OR = torch.nn.functional.pad(values.up_OK[:, :rank_v], (rank_k, 0))
        return exact_rope_layer(inputs, down_RD, up_k_OR, up_v_OR)

    return Decomposition(spectra=(keys.spectrum_K, values.spectrum_K), cut=cut)


def exact_rope_layer(inputs: LayerInputs, down_RD: Tensor, up_k_OR: Tensor, up_v_OR: Tensor) -> LatentLayer:
    """The exact-rope layer of a joint or block latent; queries, biases and QK-norm are the source's own."""
    heads = (inputs.num_kv_heads, inputs.head_dim)
    return LatentLayer(
        form="exact-rope",
        down_RD=down_RD,
        up_k_GMR=up_k_OR.unflatten(0, heads),
        up_v_GHR=up_v_OR.unflatten(0, heads),
        q_rope_NPD=inputs.w_q_NHD,
        inv_freq_JF=inputs.inv_freq_F[None],
        q_rope_bias_NP=inputs.b_q_NH,
        k_bias_GM=inputs.b_k_GH,
        v_bias_GH=inputs.b_v_GH,
        q_norm_XH=None if inputs.qk_norm is None else inputs.qk_norm.q_norm_XH,
        k_norm_XH=None if inputs.qk_norm is None else inputs.qk_norm.k_norm_XH,
    )


def _cholesky(c_DD: Tensor, inputs: LayerInputs) -> Tensor:
    chol_DD, info = torch.linalg.cholesky_ex(c_DD)
    if int(info) != 0:
        raise OptionError(
            f"--damping {inputs.damping}: layer {inputs.layer_idx}'s activation covariance is not positive "
            f"definite (leading minor {int(info)} of {len(c_DD)}), and SVD-LLM and Palu need its Cholesky "
            "factor. Use --damping 0.01, more --calibration-tokens, or --method care-u: the same optimum."
        )
    return chol_DD


def _whitened_factor(w_OD: Tensor, chol_DD: Tensor, c_DD: Tensor) -> Factor:
    u_OK, s_K, vh_KD = torch.linalg.svd(w_OD @ chol_DD, full_matrices=False)
    signs_K = column_signs(u_OK)
    scaled_KD = (signs_K * s_K)[:, None] * vh_KD
    down_KD = torch.linalg.solve_triangular(chol_DD, scaled_KD, upper=False, left=False)
    return make_factor(u_OK * signs_K, down_KD, c_DD)
