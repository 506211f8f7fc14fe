"""CARE's factor: its optimum, its predicted error, and that it is SVD-LLM's."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from care_mla.decompose.care import (
    care_factor,
    component_losses,
    covariance_factor,
    interleave,
    no_root_factor,
    weight_factor,
)
from layer_cases import layer_case


def test_spectrum_descends_and_is_the_output_moment():
    case = layer_case()
    m_OD = torch.cat([case.w_k_OD, case.w_v_OD])
    spectrum_O, up_OO = covariance_factor(m_OD, case.inputs.c_DD)
    y_TO = case.x_TD @ m_OD.T
    moment_OO = y_TO.T @ y_TO / len(y_TO)
    assert (spectrum_O.diff() <= 0).all()
    assert (spectrum_O >= 0).all()
    assert_close(up_OO.T @ up_OO, torch.eye(len(m_OD), dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(up_OO * spectrum_O @ up_OO.T, moment_OO, rtol=0, atol=1e-10)


def test_signs_do_not_depend_on_the_solver():
    case = layer_case()
    _, up_OO = covariance_factor(case.w_k_OD, case.inputs.c_DD)
    assert (up_OO.gather(0, up_OO.abs().argmax(0, keepdim=True)) > 0).all()


def test_more_rows_than_inputs_end_in_zeros():
    case = layer_case(hidden=12, kv_heads=2, head_dim=8)
    factor = care_factor(torch.cat([case.w_k_OD, case.w_v_OD]), case.inputs.damped_c_DD)
    assert len(factor.spectrum_K) == 32
    assert_close(factor.spectrum_K[12:], torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), rank=st.integers(0, 16), which=st.sampled_from([0, 1, 2, 3]))
def test_sum_of_the_tail_is_the_measured_error(seed: int, rank: int, which: int):
    case = layer_case(seed)
    w_OD, c_DD = case.w_k_OD, case.inputs.c_DD
    if which == 3:
        factor = interleave([weight_factor(half_OD, c_DD) for half_OD in w_OD.chunk(2)], c_DD)
    else:
        factor = (care_factor, no_root_factor, weight_factor)[which](w_OD, c_DD)
    lost_TO = case.x_TD @ (w_OD - factor.up_OK[:, :rank] @ factor.down_KD[:rank]).T
    measured = lost_TO.square().sum(1).mean()
    assert_close(factor.spectrum_K[rank:].sum(), measured, rtol=1e-8, atol=1e-10)


def test_losses_of_oblique_components_count_their_products():
    generator = torch.Generator().manual_seed(1)
    up_OK, down_KD = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(6, 4), (4, 5)]
    )
    x_TD = torch.randn(50, 5, generator=generator, dtype=torch.float64)
    losses_K = component_losses(up_OK, down_KD, x_TD.T @ x_TD / 50)
    for rank in range(5):
        measured = (x_TD @ (up_OK[:, rank:] @ down_KD[rank:]).T).square().sum(1).mean()
        assert_close(losses_K[rank:].sum(), measured, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), rank=st.integers(1, 15), step=st.sampled_from([1e-4, 1e-2, 1.0]))
def test_no_perturbed_factor_of_the_same_rank_does_better(seed: int, rank: int, step: float):
    case = layer_case(seed % 7)
    w_OD = case.w_v_OD
    factor = care_factor(w_OD, case.inputs.c_DD)
    generator = torch.Generator().manual_seed(seed)
    up_OR, down_RD = factor.up_OK[:, :rank], factor.down_KD[:rank]
    up_OR = up_OR + step * torch.randn(up_OR.shape, generator=generator, dtype=torch.float64)
    down_RD = down_RD + step * torch.randn(down_RD.shape, generator=generator, dtype=torch.float64)
    error = (case.x_TD @ (w_OD - up_OR @ down_RD).T).square().sum(1).mean()
    assert error >= factor.spectrum_K[rank:].sum() * (1 - 1e-9)
