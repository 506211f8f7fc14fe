"""RoPE on a part of each head: the order that makes pairs of all of it, and what never joins a rope key."""
# Shapes: B sequences, L positions, D hidden_size, N query heads, G KV heads, H head_dim, O key rows (G*H).

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from care_mla.budget import resolve_dims
from care_mla.calibrate.statistics import LayerSums, RotationSums
from care_mla.checkpoint.opening import open_source
from care_mla.checkpoint.source import Source
from care_mla.configs import PlanConfig
from care_mla.decompose import mha2mla, rope
from care_mla.decompose.decouple import as_complex, decouple
from care_mla.decompose.fisher import decoupled_joint
from care_mla.decompose.layer_inputs import Decomposition, LayerInputs, layer_inputs
from care_mla.families.rope import pair_order
from care_mla.mla.reference import original_projections, rotate
from layer_cases import attention, layer_case, source_attention

from pico import pico_model

PARTIAL: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}


def phi(tmp_path: Path) -> Source:
    return open_source(str(pico_model(tmp_path / "m", "phi3", rope=PARTIAL, tokenizer=False)))


def read(source: Source) -> LayerInputs:
    """A layer as methods see it; its sums say nothing."""
    facts, cpu = source.facts, torch.device("cpu")
    sizes = {"hidden_size": facts.hidden_size, "num_heads": 4, "head_dim": 16, "device": cpu}
    sums = LayerSums.zeros(num_kv_heads=2, **sizes)
    sums.tokens += 1
    sums.xx_DD += torch.eye(64, dtype=torch.float64)
    sums.key_felt_xx_DD += torch.eye(64, dtype=torch.float64)
    sums.value_felt_xx_DD += torch.eye(64, dtype=torch.float64)
    inv_freq_F = torch.cat((1e4 ** (-torch.arange(6).double() / 6), torch.zeros(2).double()))
    rotation = RotationSums.zeros(length=1, **sizes)
    return layer_inputs(source, 0, sums, rotation, inv_freq_F, damping=0.01, fisher_damping=0.1, device=cpu)


@pytest.mark.parametrize("amplitude", [1.0, 1.25])
def test_rows_in_pair_order_give_the_sources_logits(amplitude: float, tmp_path: Path) -> None:
    source = phi(tmp_path)
    if amplitude != 1:
        table = source.facts.rope_parameters | {"attention_factor": amplitude}
        source.facts = replace(source.facts, rope_parameters=table)
    assert pair_order(source.facts) == [0, 1, 2, 3, 4, 5, 12, 13, 6, 7, 8, 9, 10, 11, 14, 15]
    inputs = read(source)
    assert inputs.rotary_dim == 12
    x_BLD = torch.randn(1, 20, 64, dtype=torch.float64)
    weights = {name: tensor.double() for name, tensor in source.layer(0).items()}
    q_BNLH, k_BGLH, _ = original_projections(source.facts, weights, x_BLD, torch.arange(20))
    expected = q_BNLH @ k_BGLH.repeat_interleave(2, dim=1).mT * amplitude**2
    table_1F = inputs.inv_freq_F[None]
    q_BNLH = rotate(torch.einsum("bld,nhd->bnlh", x_BLD, inputs.w_q_NHD), torch.arange(20), table_1F)
    k_BGLH = rotate(torch.einsum("bld,ghd->bglh", x_BLD, inputs.w_k_GHD), torch.arange(20), table_1F)
    assert_close(q_BNLH @ k_BGLH.repeat_interleave(2, dim=1).mT * amplitude**2, expected)
    # transformers has the amplitude on cosines and sines alone.
    q_plain_NLH = torch.einsum("ld,nhd->nlh", x_BLD[0], weights["self_attn.q_proj.weight"].view(4, 16, 64))
    k_plain_GLH = torch.einsum("ld,ghd->glh", x_BLD[0], weights["self_attn.k_proj.weight"].view(2, 16, 64))
    first = q_plain_NLH[:, 0] * k_plain_GLH.repeat_interleave(2, dim=0)[:, 0]
    stock_N = amplitude**2 * first[:, :12].sum(-1) + first[:, 12:].sum(-1)
    assert_close(expected[0, :, 0, 0], stock_N)


def partly(kv_heads: int = 2) -> tuple[LayerInputs, torch.Tensor]:
    """The usual case with its last pair of four passed by RoPE."""
    case = layer_case(kv_heads=kv_heads)
    inv_freq_F = torch.cat((1e4 ** (-torch.arange(3).double() / 3), torch.zeros(1).double()))
    gamma_NF = case.inputs.gamma_NF + torch.tensor([0.2, 0.5, 0.8, 1.0])
    return replace(case.inputs, inv_freq_F=inv_freq_F, gamma_NF=gamma_NF, passed_dim=2), case.x_TD


METHODS: dict[str, Callable[[LayerInputs], Decomposition]] = {
    "joint": partial(decoupled_joint, qk_rope_head_dim=6),
    "transmla": partial(rope.transmla, qk_rope_head_dim=6, freqfold=1),
    "care-u": partial(rope.decoupled_care_u, qk_rope_head_dim=6, freqfold=1),
}


@pytest.mark.parametrize("method", METHODS)
def test_one_kv_head_that_keeps_all_its_rope_is_exact(method: str) -> None:
    inputs, x_TD = partly(kv_heads=1)
    decomposition = METHODS[method](inputs)
    layer = decomposition.cut((len(decomposition.spectra[0]),))
    assert layer.qk_rope_head_dim == 6
    assert_close(layer.inv_freq_JF[0], inputs.inv_freq_F[:3])
    for ours, source in zip(attention(layer, x_TD[:12]), source_attention(inputs, x_TD[:12]), strict=True):
        assert_close(ours, source, rtol=0, atol=1e-8)


@pytest.mark.parametrize("width", [6, 2])
def test_what_rope_passes_stays_as_it_is(width: int) -> None:
    inputs, _ = partly()
    split = decouple(inputs, width)
    assert_close(as_complex(split.nope_GMD, dim=1)[:, 3], as_complex(inputs.w_k_GHD, dim=1)[:, 3])
    assert_close(split.inv_freq_F, inputs.inv_freq_F[: 3 : 6 // width])
    basis = rope.rorope_split(inputs, width, 6 // width)
    basis_OO = torch.cat([basis.rope_OP, basis.nope_OX], dim=1)
    assert_close(basis_OO.T @ basis_OO, torch.eye(16, dtype=torch.float64))
    assert not basis.rope_OP.unflatten(0, (2, 2, 4))[:, :, 3].any()


def test_mha2mla_never_chooses_what_rope_passes() -> None:
    inputs, _ = partly()
    strong = replace(inputs, q_energy_NF=inputs.q_energy_NF * torch.tensor([1, 1, 1, 1e6]))
    assert mha2mla.choose_pairs(strong, 4).max() < 3


def test_widths_of_the_rope_key_divide_what_rope_turns(tmp_path: Path) -> None:
    facts = replace(phi(tmp_path).facts, head_dim=128, rotary_dim=96, num_key_value_heads=8, hidden_size=3072)
    found = resolve_dims(facts, PlanConfig(model=""), form="decoupled", method="fisher")
    assert [dims.qk_rope_head_dim for dims in found] == [48, 24, 12]
