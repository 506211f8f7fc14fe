"""Every exact-rope method against its slow definition, and its layers against the source attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from care_mla.decompose import baselines
from care_mla.decompose.layer_inputs import Decomposition, LayerInputs
from care_mla.errors import OptionError
from care_mla.factors import LatentLayer
from layer_cases import LayerCase, attention, layer_case, source_attention

SEPARATE: dict[str, Callable[[LayerInputs], Decomposition]] = {
    "svd": baselines.svd,
    "asvd": baselines.asvd,
    "svd-llm": baselines.svd_llm,
    "care-u": baselines.care_u,
    "care-c": baselines.care_c,
    "palu": baselines.palu,
}


def truncate(m_OD: Tensor, rank: int) -> Tensor:
    u_OK, s_K, vh_KD = torch.linalg.svd(m_OD, full_matrices=False)
    return (u_OK[:, :rank] * s_K[:rank]) @ vh_KD[:rank]


def root(c_DD: Tensor) -> Tensor:
    eigenvalues_D, u_DD = torch.linalg.eigh(c_DD)
    return (u_DD * eigenvalues_D.sqrt()) @ u_DD.T


def definition(method: str, w_OD: Tensor, inputs: LayerInputs, rank: int) -> Tensor:
    """The truncated projection, written as the paper writes it."""
    c_DD = inputs.damped_c_DD
    match method:
        case "svd":
            return truncate(w_OD, rank)
        case "asvd":
            whitener_DD = inputs.mean_abs_D.sqrt().diag()
        case "svd-llm":
            whitener_DD = torch.linalg.cholesky(c_DD)
        case "care-u":
            whitener_DD = root(c_DD)
        case "care-c":
            whitener_DD = c_DD
        case _:
            raise AssertionError(method)
    return truncate(w_OD @ whitener_DD, rank) @ torch.linalg.inv(whitener_DD)


def keys_and_values(layer: LatentLayer) -> tuple[Tensor, Tensor]:
    return layer.up_k_GMR.flatten(0, 1) @ layer.down_RD, layer.up_v_GHR.flatten(0, 1) @ layer.down_RD


@pytest.mark.parametrize("method", [name for name in SEPARATE if name != "palu"])
@pytest.mark.parametrize("ranks", [(5, 9), (1, 16), (0, 3)])
def test_method_is_its_definition(method: str, ranks: tuple[int, int]):
    case = layer_case()
    keys_OD, values_OD = keys_and_values(SEPARATE[method](case.inputs).cut(ranks))
    assert_close(keys_OD, definition(method, case.w_k_OD, case.inputs, ranks[0]), rtol=0, atol=1e-8)
    assert_close(values_OD, definition(method, case.w_v_OD, case.inputs, ranks[1]), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("kv_heads", "group_size"), [(8, 4), (6, 3), (5, 1), (3, 3), (2, 2)])
def test_palu_spreads_the_rank_evenly_over_groups_of_heads(kv_heads: int, group_size: int):
    case = layer_case(hidden=72, heads=kv_heads, kv_heads=kv_heads)
    num_groups = kv_heads // group_size
    rank = 3 * num_groups + (num_groups > 1)
    group_ranks = [3 + (group == 0 and num_groups > 1) for group in range(num_groups)]
    keys_OD, _ = keys_and_values(baselines.palu(case.inputs).cut((rank, rank)))
    wanted = [
        definition("svd-llm", group_OD, case.inputs, group_rank)
        for group_OD, group_rank in zip(case.w_k_OD.chunk(num_groups), group_ranks, strict=True)
    ]
    assert_close(keys_OD, torch.cat(wanted), rtol=0, atol=1e-8)


def test_care_is_svd_llm_at_equal_damping_and_so_is_palu_with_one_group():
    case = layer_case()
    wanted = SEPARATE["svd-llm"](case.inputs)
    for method in ("care-u", "palu"):
        found = SEPARATE[method](case.inputs)
        for spectrum, other in zip(found.spectra, wanted.spectra, strict=True):
            assert_close(spectrum, other, rtol=1e-8, atol=1e-10)
        for ours, theirs in zip(
            keys_and_values(found.cut((6, 4))), keys_and_values(wanted.cut((6, 4))), strict=True
        ):
            assert_close(ours, theirs, rtol=0, atol=1e-8)


def measured_error(case: LayerCase, layer: LatentLayer) -> tuple[Tensor, Tensor]:
    keys_OD, values_OD = keys_and_values(layer)
    lost_k_TO = case.x_TD @ (case.w_k_OD - keys_OD).T
    lost_v_TO = case.x_TD @ (case.w_v_OD - values_OD).T
    return lost_k_TO.square().sum(1).mean(), lost_v_TO.square().sum(1).mean()


@pytest.mark.parametrize("method", SEPARATE)
def test_predicted_error_is_the_measured_one(method: str):
    case = layer_case()
    decomposition = SEPARATE[method](case.undamped())
    for ranks in [(0, 0), (1, 4), (7, 2), (16, 15)]:
        predicted = [
            spectrum[rank:].sum() for spectrum, rank in zip(decomposition.spectra, ranks, strict=True)
        ]
        measured = measured_error(case, decomposition.cut(ranks))
        assert_close(torch.stack(predicted), torch.stack(measured), rtol=1e-8, atol=1e-10)


def test_joint_predicts_its_error_and_beats_separate_latents_of_the_same_width():
    case = layer_case()
    joint, separate = baselines.joint(case.undamped()), baselines.care_u(case.undamped())
    for rank in (2, 8, 20, 32):
        layer = joint.cut((rank,))
        assert layer.cached_values == rank
        total = sum(measured_error(case, layer))
        assert_close(joint.spectra[0][rank:].sum(), total, rtol=1e-8, atol=1e-10)
        best = sum(measured_error(case, separate.cut((rank // 2, rank - rank // 2))))
        assert total <= best + 1e-10


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", [*SEPARATE, "joint"])
def test_full_rank_is_the_source_attention(method: str, bias: bool):
    case = layer_case(bias=bias)
    x_LD = case.x_TD[:12]
    full = (32,) if method == "joint" else (16, 16)
    layer = (baselines.joint if method == "joint" else SEPARATE[method])(case.inputs).cut(full)
    assert layer.form == "exact-rope"
    assert layer.cached_values == 32
    for ours, source in zip(attention(layer, x_LD), source_attention(case.inputs, x_LD), strict=True):
        assert_close(ours, source, rtol=0, atol=1e-8)


def test_rank_beyond_the_components_is_our_own_bug():
    decomposition = baselines.care_u(layer_case().inputs)
    with pytest.raises(AssertionError):
        decomposition.cut((17, 1))


def test_singular_covariance_is_refused_by_name():
    case = layer_case()
    singular = replace(case.undamped(), c_DD=torch.zeros_like(case.inputs.c_DD))
    with pytest.raises(OptionError, match=r"--damping 0\.01"):
        baselines.svd_llm(singular)


def test_silent_channel_is_no_trouble_for_asvd():
    case = layer_case()
    silent = replace(case.inputs, mean_abs_D=case.inputs.mean_abs_D.index_fill(0, torch.tensor([3]), 0.0))
    layer = baselines.asvd(silent).cut((8, 8))
    assert all(tensor.isfinite().all() for tensor in layer.tensors().values())
