"""The default factor: optimal under its metric, the same whether KV heads or query heads are weighted."""
# Shapes: T tokens, D hidden_size, N query heads, G KV heads, H head_dim, O rows, R rank.

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from care_mla.decompose.baselines import joint
from care_mla.decompose.decouple import as_complex, as_pairs, decouple
from care_mla.decompose.fisher import (
    FELT_SHARE,
    damp_blocks,
    decoupled_fisher,
    decoupled_joint,
    exact_fisher,
    felt_covariance,
    weighted_factor,
)
from layer_cases import layer_case


def spd(size: int, seed: int) -> Tensor:
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.T / size


def loss(m_OD: Tensor, low_OD: Tensor, c_DD: Tensor, fisher_OO: Tensor) -> float:
    error_OD = m_OD - low_OD
    return float((fisher_OO @ error_OD @ c_DD @ error_OD.T).trace())


@settings(deadline=None, max_examples=30)
@given(rank=st.integers(1, 11), seed=st.integers(0, 10**6))
def test_no_other_factor_of_the_rank_loses_less(rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    m_OD = torch.randn(12, 16, generator=generator, dtype=torch.float64)
    c_DD, fisher_OO = spd(16, seed + 1), spd(12, seed + 2) + 0.01 * torch.eye(12, dtype=torch.float64)
    factor = weighted_factor(m_OD, c_DD, fisher_OO)
    up_OR, down_RD = factor.up_OK[:, :rank], factor.down_KD[:rank]
    best = loss(m_OD, up_OR @ down_RD, c_DD, fisher_OO)
    assert best == pytest.approx(float(factor.spectrum_K[rank:].sum()), rel=1e-6, abs=1e-9)
    other_up = up_OR + 0.05 * torch.randn(up_OR.shape, generator=generator, dtype=torch.float64)
    other_down = down_RD + 0.05 * torch.randn(down_RD.shape, generator=generator, dtype=torch.float64)
    assert best <= loss(m_OD, other_up @ other_down, c_DD, fisher_OO) + 1e-9


def test_full_rank_gives_the_matrix_back() -> None:
    m_OD = torch.randn(6, 9, dtype=torch.float64)
    factor = weighted_factor(m_OD, spd(9, 0), spd(6, 1) + 0.1 * torch.eye(6, dtype=torch.float64))
    assert_close(factor.up_OK @ factor.down_KD, m_OD)


def test_without_fisher_information_it_is_joint_care() -> None:
    inputs = layer_case().inputs
    flat = replace(inputs, felt_c_DD=inputs.c_DD, fisher_exact_OO=torch.eye(32, dtype=torch.float64))
    ours, reference = exact_fisher(flat).cut((5,)), joint(inputs).cut((5,))
    assert_close(
        ours.up_k_GMR.flatten(0, 1) @ ours.down_RD, reference.up_k_GMR.flatten(0, 1) @ reference.down_RD
    )
    assert_close(
        ours.up_v_GHR.flatten(0, 1) @ ours.down_RD, reference.up_v_GHR.flatten(0, 1) @ reference.down_RD
    )


def test_each_block_is_damped_by_its_own_mean() -> None:
    damped_OO = damp_blocks(torch.diag(torch.tensor([1.0, 3.0, 100.0, 300.0, 200.0])), 2, 0.5)
    assert_close(damped_OO.diagonal(), torch.tensor([2.0, 4.0, 200.0, 400.0, 300.0]))


def test_felt_covariance_is_a_mixture_damped_like_all_others() -> None:
    inputs = replace(layer_case().inputs, felt_c_DD=spd(48, 3))
    mixed_DD = (1 - FELT_SHARE) * inputs.c_DD + FELT_SHARE * inputs.felt_c_DD
    expected_DD = mixed_DD + inputs.damping * mixed_DD.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    assert_close(felt_covariance(inputs), expected_DD)


def test_kv_head_metric_cuts_as_the_stack_of_all_query_heads_does() -> None:
    """N_h = Gamma_h N_g, so weighting [N W_K; W_V] by G0 is weighting the n_h-head stack by its own G."""
    case = layer_case(heads=4, kv_heads=2)
    num_heads, num_groups, head_dim, tokens = 4, 2, case.inputs.head_dim, 300
    gamma_NF = torch.polar(torch.rand(4, 4, dtype=torch.float64), 6 * torch.rand(4, 4, dtype=torch.float64))
    # Gradients at every head's own NoPE key n_h, and at the values.
    grad_TNF = torch.randn(tokens, num_heads, head_dim // 2, dtype=torch.complex128)
    grad_v_TO = torch.randn(tokens, num_groups * head_dim, dtype=torch.float64)
    grad_TGF = (gamma_NF.conj() * grad_TNF).unflatten(1, (num_groups, -1)).sum(2)
    per_group = torch.cat([as_pairs(grad_TGF, dim=2).flatten(1), grad_v_TO], dim=1)
    per_head = torch.cat([as_pairs(grad_TNF, dim=2).flatten(1), grad_v_TO], dim=1)
    split = decouple(replace(case.inputs, gamma_NF=gamma_NF), 4)
    rows_OD = torch.cat([split.nope_GMD.flatten(0, 1), case.w_v_OD])
    heads_GFD = as_complex(split.nope_GMD, dim=1).repeat_interleave(num_heads // num_groups, dim=0)
    stack_OD = torch.cat([as_pairs(gamma_NF[:, :, None] * heads_GFD, dim=1).flatten(0, 1), case.w_v_OD])
    c_DD = case.inputs.damped_c_DD
    group_metric_OO, head_metric_OO = (g.T @ g / tokens for g in (per_group, per_head))
    small = weighted_factor(rows_OD, c_DD, group_metric_OO)
    # The stack's metric may be singular only in directions that no stack of this form has; damp it a little.
    eye_OO = 1e-12 * torch.eye(len(head_metric_OO), dtype=torch.float64)
    large = weighted_factor(stack_OD, c_DD, head_metric_OO + eye_OO)
    assert_close(small.spectrum_K[:20], large.spectrum_K[:20], rtol=1e-6, atol=1e-9)
    for rank in (3, 8):
        low_OD = small.up_OK[:, :rank] @ small.down_KD[:rank]
        keys_GMD = low_OD[: num_groups * head_dim].unflatten(0, (num_groups, head_dim))
        lifted = as_complex(keys_GMD, dim=1).repeat_interleave(num_heads // num_groups, dim=0)
        lifted_OD = torch.cat(
            [as_pairs(gamma_NF[:, :, None] * lifted, dim=1).flatten(0, 1), low_OD[num_groups * head_dim :]]
        )
        best = large.up_OK[:, :rank] @ large.down_KD[:rank]
        assert loss(stack_OD, lifted_OD, c_DD, head_metric_OO) == pytest.approx(
            loss(stack_OD, best, c_DD, head_metric_OO), rel=1e-6
        )


@pytest.mark.parametrize("method", [decoupled_fisher, decoupled_joint])
@pytest.mark.parametrize("width", [8, 4, 2])
def test_decoupled_layers_have_the_sizes_asked_for(method, width: int) -> None:
    inputs = layer_case().inputs
    layer = method(inputs, qk_rope_head_dim=width).cut((10,))
    assert (layer.form, layer.kv_lora_rank, layer.qk_rope_head_dim) == ("decoupled", 10, width)
    assert layer.cached_values == 10 + width
    assert_close(layer.inv_freq_JF[0], inputs.inv_freq_F[:: inputs.head_dim // width])
    assert layer.v_bias_GH is inputs.b_v_GH
