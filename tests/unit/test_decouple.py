"""Decoupling by complex PCA: what it leaves unchanged, what it minimises, and its ablations."""
# Shapes: T tokens, L positions, D hidden_size, N query heads, G KV heads, H head_dim, P qk_rope_head_dim, F
#         frequencies.

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from care_mla.decompose.decouple import as_complex, as_pairs, decouple
from care_mla.decompose.layer_inputs import LayerInputs
from layer_cases import layer_case


def turned(inputs: LayerInputs, seed: int = 0) -> LayerInputs:
    """The case with a random mean rotation in each head."""
    generator = torch.Generator().manual_seed(seed)
    shape = inputs.gamma_NF.shape
    size = torch.rand(shape, generator=generator, dtype=torch.float64)
    angle = torch.rand(shape, generator=generator, dtype=torch.float64) * 6
    return replace(inputs, gamma_NF=torch.polar(size, angle))


def rotated_logits(inputs: LayerInputs, x_LD: Tensor) -> Tensor:
    """The source's logits (N, L, L) with RoPE, unscaled, row the query."""
    groups = inputs.num_heads // inputs.num_kv_heads
    q_LNF = as_complex(torch.einsum("ld,nhd->lnh", x_LD, inputs.w_q_NHD) + inputs.b_q_NH, dim=2)
    k_LGF = as_complex(torch.einsum("ld,ghd->lgh", x_LD, inputs.w_k_GHD) + inputs.b_k_GH, dim=2)
    turn_LF = torch.exp(1j * torch.arange(len(x_LD))[:, None] * inputs.inv_freq_F)
    q_LNF, k_LNF = q_LNF * turn_LF[:, None], (k_LGF * turn_LF[:, None]).repeat_interleave(groups, dim=1)
    return torch.einsum("tnf,snf->nts", q_LNF.conj(), k_LNF).real


def split_logits(inputs: LayerInputs, x_LD: Tensor, width: int) -> Tensor:
    """Logits of the decoupled layer before any rank cut."""
    split = decouple(inputs, width)
    groups = inputs.num_heads // inputs.num_kv_heads
    turn_LF = torch.exp(1j * torch.arange(len(x_LD))[:, None] * split.inv_freq_F)
    q_LNF = as_complex(torch.einsum("ld,nhd->lnh", x_LD, split.q_rope_NPD) + split.q_rope_bias_NP, dim=2)
    k_LF = as_complex(x_LD @ split.k_rope_PD.T + split.k_rope_bias_P, dim=1)
    rope_NLL = torch.einsum("tnf,sf->nts", (q_LNF * turn_LF[:, None]).conj(), k_LF * turn_LF).real
    q_LNM = torch.einsum("ld,nmd->lnm", x_LD, split.q_nope_NMD) + split.q_nope_bias_NM
    k_LNM = torch.einsum("ld,gmd->lgm", x_LD, split.nope_GMD).repeat_interleave(groups, dim=1)
    return rope_NLL + torch.einsum("tnm,snm->nts", q_LNM, k_LNM)


def test_pairs_and_complex_numbers_are_the_same_thing() -> None:
    x = torch.randn(3, 8, 2, dtype=torch.float64)
    assert torch.equal(as_pairs(as_complex(x, dim=1), dim=1), x)


def test_one_kv_head_at_full_width_keeps_every_logit() -> None:
    case = layer_case(kv_heads=1)
    inputs = turned(case.inputs)
    x_LD = case.x_TD[:20]
    assert_close(split_logits(inputs, x_LD, inputs.head_dim), rotated_logits(inputs, x_LD))
    assert decouple(inputs, inputs.head_dim).nope_GMD.abs().max() < 1e-12


def test_where_nothing_rotates_the_split_loses_nothing() -> None:
    """With theta = 0 and gamma = 1, rope key and rest add up to the key."""
    case = layer_case()
    inputs = replace(
        case.inputs,
        inv_freq_F=torch.zeros_like(case.inputs.inv_freq_F),
        gamma_NF=torch.ones_like(case.inputs.gamma_NF),
        b_k_GH=torch.zeros_like(case.inputs.b_k_GH),
    )
    x_LD = case.x_TD[:20]
    for width in (2, 4, 8):
        assert_close(split_logits(inputs, x_LD, width), rotated_logits(inputs, x_LD))


def rotation_loss(inputs: LayerInputs, pick_S: Tensor, rebuild_S: Tensor, block: slice) -> float:
    """sum over (g, f) of the block of d^2 E|k - v k'|^2, from its definition."""
    groups = inputs.num_kv_heads
    w_SD = as_complex(inputs.w_k_GHD, dim=1)[:, block].flatten(0, 1)
    b_S = as_complex(inputs.b_k_GH, dim=1)[:, block].flatten()
    weight_GF = (inputs.q_energy_NF * (1 - inputs.gamma_NF.abs().square())).unflatten(0, (groups, -1)).sum(1)
    mean_S = w_SD @ inputs.mean_D.to(w_SD.dtype)
    moment_SS = w_SD @ inputs.c_DD.to(w_SD.dtype) @ w_SD.mH
    moment_SS = moment_SS + torch.outer(mean_S, b_S.conj()) + torch.outer(b_S, mean_S.conj())
    moment_SS = moment_SS + torch.outer(b_S, b_S.conj())
    left_SS = torch.eye(len(b_S), dtype=w_SD.dtype) - torch.outer(rebuild_S, pick_S)
    error_S = (left_SS @ moment_SS @ left_SS.mH).diagonal().real
    return float((weight_GF[:, block].flatten() * error_S).sum())


@pytest.mark.parametrize("width", [8, 4, 2])
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_no_other_rope_key_loses_less_rotation(width: int, seed: int) -> None:
    inputs = turned(layer_case().inputs)
    fold = inputs.head_dim // width
    split = decouple(inputs, width)
    w_k_GFD = as_complex(inputs.w_k_GHD, dim=1)
    k_rope_BD = as_complex(split.k_rope_PD, dim=0)
    generator = torch.Generator().manual_seed(seed)
    for block_idx in range(width // 2):
        block = slice(block_idx * fold, (block_idx + 1) * fold)
        w_SD = w_k_GFD[:, block].flatten(0, 1)
        pick_S = torch.linalg.lstsq(w_SD.T, k_rope_BD[block_idx][:, None]).solution[:, 0]
        rest_SD = as_complex(split.nope_GMD, dim=1)[:, block].flatten(0, 1)
        rebuild_S = ((w_SD - rest_SD) @ k_rope_BD[block_idx].conj()) / k_rope_BD[
            block_idx
        ].abs().square().sum()
        best = rotation_loss(inputs, pick_S, rebuild_S, block)
        noise = torch.randn(2, len(pick_S), 2, generator=generator, dtype=torch.float64) * 0.1
        other_pick, other_rebuild = torch.view_as_complex(noise)
        assert best <= rotation_loss(inputs, pick_S + other_pick, rebuild_S + other_rebuild, block) + 1e-12


def test_a_head_that_sees_no_rotation_needs_no_rope_key() -> None:
    inputs = replace(layer_case().inputs, gamma_NF=torch.ones_like(layer_case().inputs.gamma_NF))
    split = decouple(inputs, 4)
    assert split.k_rope_PD.abs().max() == 0
    assert split.q_rope_NPD.abs().max() == 0
    assert_close(split.nope_GMD, inputs.w_k_GHD)


def test_ablations_take_the_plain_key_and_equal_weights() -> None:
    inputs = turned(layer_case().inputs)
    plain = decouple(inputs, 4, use_gamma=False)
    assert_close(plain.q_nope_NMD, inputs.w_q_NHD)
    unweighted = decouple(inputs, 4, query_weights=False)
    assert not torch.allclose(unweighted.k_rope_PD, decouple(inputs, 4).k_rope_PD)


def test_the_same_layer_gives_the_same_file() -> None:
    inputs = turned(layer_case().inputs)
    first, second = decouple(inputs, 4), decouple(inputs, 4)
    assert torch.equal(first.k_rope_PD, second.k_rope_PD)
    assert as_complex(first.k_rope_PD, dim=0).isfinite().all()


def test_without_folding_only_kept_frequencies_have_rope() -> None:
    inputs = turned(layer_case().inputs)
    split = decouple(inputs, 4, fold=False)
    rest_GFD, keys_GFD = as_complex(split.nope_GMD, dim=1), as_complex(inputs.w_k_GHD, dim=1)
    assert_close(rest_GFD[:, 1::2], keys_GFD[:, 1::2])
    assert not torch.allclose(rest_GFD[:, ::2], keys_GFD[:, ::2])
    assert as_complex(split.k_rope_PD, dim=0).abs().min(dim=1).values.max() > 0


def test_the_share_of_rope_that_a_head_keeps_is_that_of_its_keys_energy() -> None:
    """Against samples: what is left of each head's keys has the rest; one KV head at full width keeps all."""
    case = layer_case(kv_heads=2)
    inputs = turned(replace(case.inputs, b_k_GH=None, b_q_NH=None))
    split = decouple(inputs, inputs.head_dim // 2)
    keys_TGF = as_complex(torch.einsum("td,ghd->tgh", case.x_TD, inputs.w_k_GHD), dim=2)
    rest_TGF = as_complex(torch.einsum("td,ghd->tgh", case.x_TD, split.nope_GMD), dim=2)
    weight_NF = inputs.q_energy_NF * (1 - inputs.gamma_NF.abs().square())
    heads = inputs.num_heads // 2
    whole_N, lost_N = (
        (weight_NF * energy.abs().square().mean(0).repeat_interleave(heads, dim=0)).sum(1)
        for energy in (keys_TGF, rest_TGF)
    )
    assert_close(split.rope_kept_N, 1 - lost_N / whole_N)
    alone = turned(layer_case(kv_heads=1).inputs)
    assert_close(
        decouple(alone, alone.head_dim).rope_kept_N, torch.ones(alone.num_heads, dtype=torch.float64)
    )
