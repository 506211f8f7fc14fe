"""One attention layer as the methods see it, and attention to judge them by.

Tokens are random with a decaying spectrum.

`attention` is the definition of `LatentLayer`, `source_attention` that of the source: both short, slow and
float64.
"""
# Shapes: L positions, T tokens, D hidden_size, N query heads, G KV heads, H head_dim, P width that is
#         rotated, M width that is not, J rope-key heads, F frequencies.

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from care_mla.decompose.layer_inputs import LayerInputs
from care_mla.factors import LatentLayer


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """A layer and the tokens that its moments come from."""

    inputs: LayerInputs
    x_TD: Tensor

    def undamped(self) -> LayerInputs:
        return replace(self.inputs, damping=0.0)

    @property
    def w_k_OD(self) -> Tensor:
        return self.inputs.w_k_GHD.flatten(0, 1)

    @property
    def w_v_OD(self) -> Tensor:
        return self.inputs.w_v_GHD.flatten(0, 1)


def layer_case(
    seed: int = 0,
    *,
    hidden: int = 48,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    tokens: int = 400,
    bias: bool = True,
) -> LayerCase:
    """Random weights, biases and tokens; channels and their mixtures decay, and tokens have a mean."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    decay_D = torch.logspace(0, -2, hidden, dtype=torch.float64)
    x_TD = (normal(tokens, hidden) * decay_D) @ normal(hidden, hidden) + 0.3 * normal(hidden)
    w_q_NHD = normal(heads, head_dim, hidden) / math.sqrt(hidden)
    w_k_GHD = (
        normal(kv_heads, head_dim, hidden) / math.sqrt(hidden) * torch.linspace(2, 0.3, head_dim)[:, None]
    )
    w_v_GHD = 0.3 * normal(kv_heads, head_dim, hidden) / math.sqrt(hidden)
    b_q_NH, b_k_GH, b_v_GH = (normal(n, head_dim) if bias else None for n in (heads, kv_heads, kv_heads))
    q_TNH = torch.einsum("td,nhd->tnh", x_TD, w_q_NHD) + (0 if b_q_NH is None else b_q_NH)
    num_freq, num_rows = head_dim // 2, 2 * kv_heads * head_dim
    inputs = LayerInputs(
        layer_idx=0,
        w_q_NHD=w_q_NHD,
        w_k_GHD=w_k_GHD,
        w_v_GHD=w_v_GHD,
        b_q_NH=b_q_NH,
        b_k_GH=b_k_GH,
        b_v_GH=b_v_GH,
        c_DD=x_TD.T @ x_TD / tokens,
        felt_c_DD=x_TD.T @ x_TD / tokens,
        mean_D=x_TD.mean(0),
        mean_abs_D=x_TD.abs().mean(0),
        q_energy_NF=q_TNH.square().mean(0).unflatten(1, (2, num_freq)).sum(1),
        gamma_NF=torch.zeros(heads, num_freq, dtype=torch.complex128),
        fisher_exact_OO=torch.eye(num_rows, dtype=torch.float64),
        fisher_nope_OO=torch.eye(num_rows, dtype=torch.float64),
        inv_freq_F=10000.0 ** (-torch.arange(num_freq, dtype=torch.float64) / num_freq),
        unscaled_F=torch.ones(num_freq, dtype=torch.bool),
        rope_theta=10000.0,
        damping=0.01,
        fisher_damping=0.03,
    )
    return LayerCase(inputs=inputs, x_TD=x_TD)


def rotate(x_LAP: Tensor, inv_freq_AF: Tensor) -> Tensor:
    """RoPE in half-split order, with frequencies of its own for each head A."""
    positions_L = torch.arange(len(x_LAP), dtype=x_LAP.dtype)
    turn_LAF = torch.polar(torch.ones(()).double(), positions_L[:, None, None] * inv_freq_AF)
    real_LAF, imag_LAF = x_LAP.chunk(2, dim=-1)
    turned_LAF = torch.complex(real_LAF, imag_LAF) * turn_LAF
    return torch.cat([turned_LAF.real, turned_LAF.imag], dim=-1)


def _linear(x_LD: Tensor, w_AHD: Tensor, b_AH: Tensor | None) -> Tensor:
    y_LAH = torch.einsum("ld,ahd->lah", x_LD, w_AHD)
    return y_LAH if b_AH is None else y_LAH + b_AH


def _attend(logits_NLL: Tensor, v_LNH: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    future_LL = torch.ones(logits_NLL.shape[1:]).triu(1).bool()
    weights_NLL = (logits_NLL / math.sqrt(head_dim)).masked_fill(future_LL, -math.inf).softmax(-1)
    return weights_NLL, torch.einsum("nst,tnh->snh", weights_NLL, v_LNH)


def source_attention(inputs: LayerInputs, x_LD: Tensor) -> tuple[Tensor, Tensor]:
    """Attention probabilities (N, L, L) and outputs (L, N, H) of the source layer."""
    repeat = inputs.num_heads // inputs.num_kv_heads
    q_LNH = rotate(_linear(x_LD, inputs.w_q_NHD, inputs.b_q_NH), inputs.inv_freq_F)
    k_LGH = rotate(_linear(x_LD, inputs.w_k_GHD, inputs.b_k_GH), inputs.inv_freq_F)
    v_LGH = _linear(x_LD, inputs.w_v_GHD, inputs.b_v_GH)
    logits_NLL = torch.einsum("snh,tnh->nst", q_LNH, k_LGH.repeat_interleave(repeat, 1))
    return _attend(logits_NLL, v_LGH.repeat_interleave(repeat, 1), inputs.head_dim)


def attention(layer: LatentLayer, x_LD: Tensor) -> tuple[Tensor, Tensor]:
    """Attention probabilities (N, L, L) and outputs (L, N, H) of a converted layer, from what it caches."""
    num_heads, (num_kv_heads, head_dim) = len(layer.q_rope_NPD), layer.up_v_GHR.shape[:2]
    repeat = num_heads // num_kv_heads
    latent_LR = x_LD @ layer.down_RD.T
    k_LGM = torch.einsum("lr,gmr->lgm", latent_LR, layer.up_k_GMR)
    v_LGH = _linear(latent_LR, layer.up_v_GHR, layer.v_bias_GH)
    q_LNP = _linear(x_LD, layer.q_rope_NPD, layer.q_rope_bias_NP)
    if layer.k_rope_JPD is None:
        if layer.k_bias_GM is not None:
            k_LGM = k_LGM + layer.k_bias_GM
        k_LJP = rotate(k_LGM, layer.inv_freq_JF)
        logits_NLL = torch.zeros(num_heads, len(x_LD), len(x_LD), dtype=x_LD.dtype)
    else:
        assert layer.k_bias_GM is None
        assert layer.q_nope_NMD is not None
        q_LNM = _linear(x_LD, layer.q_nope_NMD, layer.q_nope_bias_NM)
        logits_NLL = torch.einsum("snm,tnm->nst", q_LNM, k_LGM.repeat_interleave(repeat, 1))
        k_LJP = rotate(_linear(x_LD, layer.k_rope_JPD, layer.k_rope_bias_JP), layer.inv_freq_JF)
    inv_freq_NF = layer.inv_freq_JF.repeat_interleave(num_heads // len(layer.inv_freq_JF), 0)
    k_LNP = k_LJP.repeat_interleave(num_heads // k_LJP.shape[1], 1)
    logits_NLL = logits_NLL + torch.einsum("snp,tnp->nst", rotate(q_LNP, inv_freq_NF), k_LNP)
    return _attend(logits_NLL, v_LGH.repeat_interleave(repeat, 1), head_dim)
