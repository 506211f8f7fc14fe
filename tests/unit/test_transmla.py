"""TransMLA's RoPE split and what builds on it, X-EcoMLA, MHA2MLA: definitions, and where they are exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from care_mla.decompose import mha2mla, rope
from care_mla.decompose.layer_inputs import Decomposition, LayerInputs
from care_mla.errors import OptionError
from layer_cases import attention, layer_case, rotate, source_attention

Method = Callable[[LayerInputs], Decomposition]
DECOUPLED: dict[str, Callable[..., Decomposition]] = {
    "transmla": rope.transmla,
    "care-u": rope.decoupled_care_u,
    "care-c": rope.decoupled_care_c,
}
WIDTH_AND_FOLD = [(8, 1), (8, 2), (8, 4), (4, 2), (4, 4), (2, 4)]


def still(inputs: LayerInputs) -> LayerInputs:
    """The same layer without any rotation, where giving up RoPE costs nothing."""
    return replace(inputs, inv_freq_F=torch.zeros_like(inputs.inv_freq_F))


def assert_same_attention(decomposition: Decomposition, inputs: LayerInputs, x_LD: Tensor) -> None:
    layer = decomposition.cut((len(decomposition.spectra[0]),))
    for ours, source in zip(attention(layer, x_LD), source_attention(inputs, x_LD), strict=True):
        assert_close(ours, source, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("width", "freqfold"), WIDTH_AND_FOLD)
def test_split_is_the_pca_of_each_frequency_block(width: int, freqfold: int):
    case = layer_case()
    split = rope.rorope_split(case.inputs, width, freqfold)
    collapse, num_freq = 8 // width, 4
    k_TGF2 = (case.x_TD @ case.w_k_OD.T + case.inputs.b_k_GH.flatten()).unflatten(1, (2, 2, num_freq)).mT
    basis_OO = torch.cat([split.rope_OP, split.nope_OX], dim=1)
    assert_close(basis_OO.T @ basis_OO, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(split.inv_freq_JF, case.inputs.inv_freq_F[None, ::collapse])

    pair = 0
    for start in range(0, num_freq, freqfold):
        samples = k_TGF2[:, :, start : start + freqfold].flatten(1, 2).mT.flatten(0, 1)  # (2T, G * freqfold)
        energies = torch.linalg.eigvalsh(samples.T @ samples / len(case.x_TD)).flip(0)
        for energy in energies[: freqfold // collapse]:
            k_rope_T2 = k_TGF2.mT.flatten(1) @ split.rope_OP[:, [pair, pair + width // 2]]
            assert_close(k_rope_T2.square().sum(1).mean(), energy, rtol=1e-10, atol=0)
            pair += 1
    assert pair == width // 2


def test_full_rotation_at_fold_1_leaves_every_logit_unchanged():
    case = layer_case()
    inputs, x_LD = case.inputs, case.x_TD[:20]
    split = rope.rorope_split(inputs, 8, 1)
    # With RoPE kept on all directions, each at the frequency of its block: nothing may change at any
    # position.
    frequencies_O = torch.cat([inputs.inv_freq_F.repeat(2), inputs.inv_freq_F.repeat(2)])
    basis_OO = torch.cat([split.rope_OP, split.nope_OX], dim=1)
    k_LO = x_LD @ case.w_k_OD.T + inputs.b_k_GH.flatten()
    q_LNH = torch.einsum("ld,nhd->lnh", x_LD, inputs.w_q_NHD) + inputs.b_q_NH
    for head in range(4):
        q_LO = torch.zeros_like(k_LO)
        q_LO[:, 8 * (head // 2) : 8 * (head // 2) + 8] = q_LNH[:, head]
        turned = []
        for y_LO in (q_LO @ basis_OO, k_LO @ basis_OO):
            halves = [rotate(part[:, None], frequencies_O[None, :4])[:, 0] for part in y_LO.split(8, dim=1)]
            turned.append(torch.cat(halves, dim=1))
        source = [
            rotate(y_LNH, inputs.inv_freq_F)
            for y_LNH in (q_LNH[:, [head]], k_LO.unflatten(1, (2, 8))[:, [head // 2]])
        ]
        assert_close(turned[0] @ turned[1].T, source[0][:, 0] @ source[1][:, 0].T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", DECOUPLED)
def test_one_kv_head_with_full_width_is_exact_with_rope(method: str):
    case = layer_case(kv_heads=1)
    decomposition = DECOUPLED[method](case.inputs, qk_rope_head_dim=8, freqfold=1)
    assert_same_attention(decomposition, case.inputs, case.x_TD[:12])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "freqfold"), WIDTH_AND_FOLD)
@pytest.mark.parametrize("method", DECOUPLED)
def test_full_rank_without_rotation_is_the_source_attention(
    method: str, width: int, freqfold: int, bias: bool
):
    case = layer_case(bias=bias)
    inputs = still(case.inputs)
    decomposition = DECOUPLED[method](inputs, qk_rope_head_dim=width, freqfold=freqfold)
    layer = decomposition.cut((10,))
    assert layer.form == "decoupled"
    assert layer.cached_values == 10 + width
    assert_same_attention(decomposition, inputs, case.x_TD[:12])


def test_transmla_is_its_definition():
    case = layer_case(bias=False)
    rank, width = 7, 4
    split = rope.rorope_split(case.undamped(), width, 2)
    k_TX, v_TO = case.x_TD @ case.w_k_OD.T @ split.nope_OX, case.x_TD @ case.w_v_OD.T
    rho = k_TX.norm(dim=0).mean() / v_TO.norm(dim=0).mean()
    y_TS = torch.cat([k_TX / rho, v_TO], dim=1)
    basis_SR = torch.linalg.eigh(y_TS.T @ y_TS).eigenvectors[:, -rank:]
    latent_TR = y_TS @ basis_SR
    wanted_k_TO = rho * latent_TR @ basis_SR[: split.nope_OX.shape[1]].T @ split.nope_OX.T
    wanted_v_TO = latent_TR @ basis_SR[split.nope_OX.shape[1] :].T

    layer = rope.transmla(case.undamped(), qk_rope_head_dim=width, freqfold=2).cut((rank,))
    found_TR = case.x_TD @ layer.down_RD.T
    assert_close(found_TR @ layer.up_k_GMR.flatten(0, 1).T, wanted_k_TO, rtol=0, atol=1e-8)
    assert_close(found_TR @ layer.up_v_GHR.flatten(0, 1).T, wanted_v_TO, rtol=0, atol=1e-8)


def test_care_u_without_balance_loses_less_than_transmla():
    case = layer_case()
    errors = {
        name: method(case.undamped(), qk_rope_head_dim=4, freqfold=2).spectra[0][8:].sum()
        for name, method in DECOUPLED.items()
    }
    assert errors["care-u"] < min(errors["transmla"], errors["care-c"])


ALL: dict[str, Method] = {
    **{name: partial(method, qk_rope_head_dim=4, freqfold=2) for name, method in DECOUPLED.items()},
    "x-ecomla": partial(rope.x_ecomla, qk_rope_head_dim=4),
    "mha2mla-joint": partial(mha2mla.mha2mla_joint, qk_rope_head_dim=4),
    "mha2mla-split": partial(mha2mla.mha2mla_split, qk_rope_head_dim=4),
}


@pytest.mark.parametrize("method", ALL)
def test_predicted_error_is_what_the_latent_loses(method: str):
    case = layer_case()
    decomposition = ALL[method](case.undamped())
    (spectrum,) = decomposition.spectra

    def rebuilt(rank: int) -> Tensor:
        layer = decomposition.cut((rank,))
        up_SR = torch.cat([layer.up_k_GMR.flatten(0, 1), layer.up_v_GHR.flatten(0, 1)])
        return case.x_TD @ (up_SR @ layer.down_RD).T

    whole_TS = rebuilt(len(spectrum))
    for rank in (1, 6, 13, len(spectrum) - 1):
        measured = (whole_TS - rebuilt(rank)).square().sum(1).mean()
        assert_close(spectrum[rank:].sum(), measured, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("width", "freqfold", "names"),
    [
        (4, 1, "freqfold 1"),
        (8, 3, "freqfold 3"),
        (3, 1, "--qk-rope-head-dim 3"),
        (6, 4, "--qk-rope-head-dim 6"),
    ],
)
def test_fold_or_width_that_does_not_divide_is_refused_by_name(width: int, freqfold: int, names: str):
    with pytest.raises(OptionError, match=names):
        rope.transmla(layer_case().inputs, qk_rope_head_dim=width, freqfold=freqfold)


def test_x_ecomla_is_its_definition_on_repeated_heads():
    case = layer_case(bias=False)
    inputs, rank, width = case.inputs, 9, 4
    repeated_OD = torch.cat([w_GHD.repeat_interleave(2, 0) for w_GHD in (inputs.w_k_GHD, inputs.w_v_GHD)])
    u_OK, s_K, vh_KD = torch.linalg.svd(repeated_OD.flatten(0, 1), full_matrices=False)
    wanted_NHD = ((u_OK[:, :rank] * s_K[:rank]) @ vh_KD[:rank]).unflatten(0, (-1, 8))

    layer = rope.x_ecomla(inputs, qk_rope_head_dim=width).cut((rank,))
    assert_close((layer.up_k_GMR @ layer.down_RD), wanted_NHD[:4:2, :4], rtol=0, atol=1e-8)
    assert_close((layer.up_v_GHR @ layer.down_RD), wanted_NHD[4::2], rtol=0, atol=1e-8)
    # Interleaved pairs of the source are (4, 5) and (6, 7); half-split order puts first members first.
    assert layer.k_rope_JPD is not None
    assert_close(layer.k_rope_JPD[0], inputs.w_k_GHD.mean(0)[[4, 6, 5, 7]])
    assert_close(layer.q_rope_NPD, inputs.w_q_NHD[:, [4, 6, 5, 7]])
    assert_close(layer.inv_freq_JF[0], 10000.0 ** (-2 * torch.arange(2).double() / width))


def test_x_ecomla_is_exact_for_one_kv_head_without_rotation():
    case = layer_case(kv_heads=1)
    inputs = still(case.inputs)
    assert_same_attention(rope.x_ecomla(inputs, qk_rope_head_dim=4), inputs, case.x_TD[:12])


@pytest.mark.parametrize("method", [mha2mla.mha2mla_joint, mha2mla.mha2mla_split])
def test_mha2mla_is_exact_where_the_pairs_that_lose_rope_do_not_turn(method: Callable[..., Decomposition]):
    for kv_heads in (1, 2):
        case = layer_case(seed=3, kv_heads=kv_heads)
        chosen = mha2mla.choose_pairs(case.inputs, 4)
        turning_F = torch.zeros(4, dtype=torch.float64)
        # A pair that any head gave up stands still for all heads, so that the source can say the same.
        for pair in range(4):
            turning_F[pair] = (chosen == pair).any(dim=1).all()
        inputs = replace(case.inputs, inv_freq_F=case.inputs.inv_freq_F * turning_F)
        assert turning_F.any()
        decomposition = method(inputs, qk_rope_head_dim=4)
        assert decomposition.cut((6,)).cached_values == kv_heads * 4 + 6
        assert_same_attention(decomposition, inputs, case.x_TD[:12])


def test_mha2mla_chooses_the_pairs_with_the_largest_norms():
    case = layer_case(seed=3)
    inputs = case.inputs
    k_T2GF = (case.x_TD @ case.w_k_OD.T + inputs.b_k_GH.flatten()).unflatten(1, (2, 2, 4)).transpose(1, 2)
    k_norm_GF = k_T2GF.square().sum(1).mean(0).sqrt()
    for head in range(2):
        q_norm_F = inputs.q_energy_NF[2 * head : 2 * head + 2].sqrt().mean(0)
        wanted = (q_norm_F * k_norm_GF[head]).argsort(descending=True)[:3].sort().values
        assert_close(mha2mla.choose_pairs(inputs, 6)[head], wanted)
    layer = mha2mla.mha2mla_joint(inputs, qk_rope_head_dim=6).cut((4,))
    assert_close(layer.inv_freq_JF, inputs.inv_freq_F[mha2mla.choose_pairs(inputs, 6)])


def test_mha2mla_split_shares_the_rank_evenly_and_leaves_nothing_unused():
    case = layer_case()
    decomposition = mha2mla.mha2mla_split(case.inputs, qk_rope_head_dim=6)
    for rank, rank_k, rank_v in [(2, 1, 1), (5, 3, 2), (8, 4, 4), (11, 4, 7)]:  # keys have 4 rows left
        layer = decomposition.cut((rank,))
        keys, values = layer.up_k_GMR.flatten(0, 1), layer.up_v_GHR.flatten(0, 1)
        assert torch.linalg.matrix_rank(keys) == rank_k
        assert torch.linalg.matrix_rank(values) == rank_v


@pytest.mark.parametrize("width", [0, 5, 8])
def test_mha2mla_refuses_a_width_without_two_sides(width: int):
    with pytest.raises(OptionError, match=f"--qk-rope-head-dim {width}"):
        mha2mla.mha2mla_joint(layer_case().inputs, qk_rope_head_dim=width)
