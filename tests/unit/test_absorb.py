"""Biases absorbed into weights: the least-squares constant, and layers without any bias."""
# Shapes: see care_mla/decompose/absorb.py; T tokens.

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from care_mla.decompose.absorb import absorbing, constant_error, constant_map
from care_mla.decompose.fisher import decoupled_fisher
from care_mla.decompose.layer_inputs import LayerInputs
from care_mla.decompose.methods import Variant, method_function
from layer_cases import LayerCase, attention, layer_case

BIASES = ("q_rope_bias_NP", "q_nope_bias_NM", "k_rope_bias_JP", "k_bias_GM", "v_bias_GH")


def test_constant_is_the_direct_least_squares_solution() -> None:
    case = layer_case()
    inputs = case.undamped()
    ones_T1 = torch.ones(len(case.x_TD), 1, dtype=torch.float64)
    direct_D1 = torch.linalg.lstsq(case.x_TD, ones_T1).solution
    assert_close(constant_map(inputs), direct_D1[:, 0], rtol=1e-6, atol=1e-8)
    assert constant_error(inputs) == pytest.approx((case.x_TD @ direct_D1 - 1).square().mean().item())
    # Damped, by its definition and not by the formula that damping would break.
    error = (case.x_TD @ constant_map(case.inputs) - 1).square().mean().item()
    assert constant_error(case.inputs) == pytest.approx(error)


def with_constant_channel(case: LayerCase) -> LayerCase:
    """Tokens with a channel that is always 2, from which a bias can be had exactly."""
    x_TD = case.x_TD.clone()
    x_TD[:, -1] = 2
    inputs = replace(
        case.inputs, c_DD=x_TD.T @ x_TD / len(x_TD), mean_D=x_TD.mean(0), damping=1e-12,
        gamma_NF=torch.full_like(case.inputs.gamma_NF, 0.5),
    )  # fmt: skip
    return replace(case, inputs=inputs, x_TD=x_TD)


@pytest.mark.parametrize("width", [8, 4])
def test_absorbing_is_exact_where_the_inputs_hold_a_constant(width: int) -> None:
    case = with_constant_channel(layer_case())
    rank = (len(case.w_k_OD) + len(case.w_v_OD),)

    def factor(inputs: LayerInputs):
        return decoupled_fisher(inputs, qk_rope_head_dim=width)

    kept, absorbed = factor(case.inputs).cut(rank), absorbing(factor)(case.inputs).cut(rank)
    assert all(getattr(absorbed, name) is None for name in BIASES)
    assert kept.q_rope_bias_NP is not None
    for found, expected in zip(
        attention(absorbed, case.x_TD[:20]), attention(kept, case.x_TD[:20]), strict=True
    ):
        assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["fisher", "joint", "transmla", "care-u", "care-c", "x-ecomla"])
def test_every_method_loses_less_than_by_dropping_biases(method: str) -> None:
    case = layer_case()
    folds = {"freqfold": 1} if method in ("transmla", "care-u", "care-c") else {}
    variant = Variant(form="decoupled", method=method, kv_lora_rank=24, qk_rope_head_dim=8, **folds)
    kept = method_function(variant)(case.inputs).cut((24,))
    absorbed = method_function(replace(variant, absorbs_biases=True))(case.inputs).cut((24,))
    assert all(getattr(absorbed, name) is None for name in BIASES)
    dropped = replace(kept, **dict.fromkeys(BIASES))
    expected = attention(kept, case.x_TD[:40])[1]
    errors = [(attention(layer, case.x_TD[:40])[1] - expected).norm() for layer in (absorbed, dropped)]
    assert errors[0] < errors[1]
