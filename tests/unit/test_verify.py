"""`verify`: a right export passes in a process of its own, and every kind of wrong one fails."""
# Shapes: see care_mla/export/verify.py.

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from care_mla.checkpoint.opening import open_source
from care_mla.configs import VerifyConfig
from care_mla.errors import CheckpointError
from care_mla.export import engine_transformers
from care_mla.export.deepseek import write_deepseek_checkpoint
from care_mla.export.hf import write_latent_checkpoint
from care_mla.export.verify import judge, read_reference, store_reference, verify
from care_mla.factors import LatentLayer
from care_mla.mla.reference import Reference
from export_cases import Exported, decoupled_layer, export, relative_error, token_ids
from latent_models import exact_layer, load

from pico import pico_model

State = dict[str, Tensor]


def verify_here(folder: Path) -> dict[str, Any]:
    """What `verify` does, but for the process of its own, which takes seconds to start."""
    return judge(read_reference(folder), *engine_transformers.run(folder))


def change_weights(folder: Path, change: Callable[[State], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(
        {name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def exact_layers(model: PreTrainedModel) -> list[LatentLayer]:
    # Wide, so that layers do not share the memory of one frequency table.
    return [exact_layer(model, i).to(dtype=torch.float64) for i in range(model.config.num_hidden_layers)]


@pytest.fixture
def qwen(tmp_path) -> Exported:
    """With every bias, and an eps that takes the residual stream's scale."""
    return export(tmp_path, family="qwen2", tokenizer=False)


def test_right_export_passes_in_a_fresh_process(qwen: Exported) -> None:
    body = verify(VerifyConfig(model=qwen.folder))
    assert body["passed"], body["problems"]
    assert body["engine"] == "transformers"
    assert body["class"] == "DeepseekV3ForCausalLM"
    assert body["relative_error"] < 1e-5
    assert body["max_abs_logprob_difference"] < 1e-3
    assert body["greedy_equal"] is True
    assert body["cached_values"] == 20 + 8
    # Against a sum over every token and word, written out.
    tokens_BL = token_ids()
    original_BLS = Reference(qwen.source, None).logits(tokens_BL).log_softmax(-1)
    converted_BLS = Reference(qwen.source, qwen.layers.__getitem__).logits(tokens_BL).log_softmax(-1)
    kl = torch.nn.functional.kl_div(converted_BLS, original_BLS, log_target=True, reduction="sum") / 48
    assert body["kl_to_original"] == pytest.approx(kl.item(), rel=1e-4)


def test_own_class_passes_in_a_fresh_process(tmp_path) -> None:
    """Remote code, a cache that keeps only its window, and no difference to the original."""
    path = pico_model(tmp_path / "source", "mistral", sliding_window=8, tied=False)
    source, model = open_source(str(path)), load(path)
    layers, out = exact_layers(model), tmp_path / "out"
    write_latent_checkpoint(source, layers.__getitem__, out, torch.float32)
    store_reference(out, source, layers.__getitem__, token_ids(), num_greedy=8)
    body = verify(VerifyConfig(model=out))
    assert body["passed"], body["problems"]
    assert body["class"] == "LatentMistralForCausalLM"
    assert body["cached_values"] == source.facts.cached_values
    assert abs(body["kl_to_original"]) < 1e-6


@pytest.mark.parametrize("options", [{"family": "qwen2"}, {"family": "llama", "tied": False}])
def test_bfloat16_passes_within_its_rounding(options: dict[str, Any], tmp_path) -> None:
    body = verify_here(export(tmp_path, torch.bfloat16, tokenizer=False, **options).folder)
    assert body["passed"], body["problems"]
    assert 1e-4 < body["relative_error"] < 5e-2


def half_split(state: State) -> None:
    """RoPE rows as the source has them, in keys and queries alike."""

    def undo(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)

    for i in range(2):
        prefix = f"model.layers.{i}.self_attn."
        for name in ("kv_a_proj_with_mqa.weight", "kv_a_proj_with_mqa.bias"):
            tensor = state[prefix + name]
            state[prefix + name] = torch.cat((tensor[:20], undo(tensor[20:])))
        q_NKX = state[f"{prefix}q_b_proj.weight"].unflatten(0, (4, 18))
        q_NKX = torch.stack([torch.cat((q_KX[:10], undo(q_KX[10:]))) for q_KX in q_NKX])
        state[f"{prefix}q_b_proj.weight"] = q_NKX.flatten(0, 1)


def scaled(name: str, factor: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[name] = state[name] * factor

    return change


def lost_query_bias(state: State) -> None:
    state["model.layers.1.self_attn.q_b_proj.weight"][:, -1] = 0


MUTATIONS: dict[str, Callable[[State], None]] = {
    "half-split-rope-rows": half_split,
    "forgotten-sigma": scaled("model.layers.0.self_attn.q_b_proj.weight", math.sqrt(16 / 18)),
    "lost-value-bias": scaled("model.layers.1.self_attn.o_proj.bias", 0),
    "lost-rope-key-bias": scaled("model.layers.0.self_attn.kv_a_proj_with_mqa.bias", 0),
    "lost-query-bias": lost_query_bias,
    "norm-changed-by-a-thousandth": scaled("model.layers.1.post_attention_layernorm.weight", 1.001),
    "final-norm-of-an-untied-model": scaled("model.norm.weight", math.sqrt(0.1)),
    "latent-norm-of-another-eps": scaled("model.layers.0.self_attn.kv_a_layernorm.weight", math.sqrt(10)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_wrong_weights_fail(name: str, qwen: Exported) -> None:
    assert verify_here(qwen.folder)["passed"]
    change_weights(qwen.folder, MUTATIONS[name])
    body = verify_here(qwen.folder)
    assert not body["passed"]
    assert "relative error" in body["problems"][0]


@pytest.mark.parametrize(
    "values",
    [
        {"rms_norm_eps": 1e-5},
        {"rope_interleave": False},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}},
    ],
)
def test_wrong_configurations_fail(values: dict[str, Any], qwen: Exported) -> None:
    change_config(qwen.folder, **values)
    body = verify_here(qwen.folder)
    assert not body["passed"]
    assert body["relative_error"] > 1e-4


@pytest.mark.parametrize(
    "change", [{"mscale_all_dim": 0.0}, {"attention_factor": 1.2}, {"factor": 8.0}, {"beta_slow": 0.5}]
)
def test_a_dropped_factor_of_yarn_fails(change: dict[str, float], tmp_path) -> None:
    source = open_source(str(pico_model(tmp_path / "source", tokenizer=False, rope="yarn")))
    layers, out = [decoupled_layer(source, seed, fold=1) for seed in range(2)], tmp_path / "out"
    rope = write_deepseek_checkpoint(source, layers.__getitem__, out, torch.float32)["rope_parameters"]
    assert rope["rope_type"] == "yarn"
    store_reference(out, source, layers.__getitem__, token_ids(), num_greedy=4)
    assert verify_here(out)["relative_error"] < 1e-5
    change_config(out, rope_parameters=rope | change)
    assert not verify_here(out)["passed"]


def test_missing_and_unknown_weights_fail_by_name(qwen: Exported) -> None:
    def rename(state: State) -> None:
        state["model.layers.0.self_attn.stray.weight"] = state.pop("model.layers.0.self_attn.o_proj.bias")

    change_weights(qwen.folder, rename)
    problems = verify_here(qwen.folder)["problems"]
    assert "missing weight: model.layers.0.self_attn.o_proj.bias" in problems
    assert "unexpected weight: model.layers.0.self_attn.stray.weight" in problems


def test_another_cache_fails(qwen: Exported) -> None:
    stored = replace(read_reference(qwen.folder), cached_values=[28, 27])
    body = judge(stored, *engine_transformers.run(qwen.folder))
    assert body["problems"] == ["cached values [28, 28], expected [28, 27]"]
    assert not body["passed"]


def test_texts_may_part_within_bfloat16s_rounding_alone(qwen: Exported) -> None:
    stored = read_reference(qwen.folder)
    found = {"logits_BLS": stored.reference_BLS + 1e-3, "greedy_T": stored.greedy_T.clone()}
    metadata = {"class": "", "cached_values": stored.cached_values, "problems": []}
    runner_up = stored.greedy_logits_TS[3].topk(2).indices[1]
    found["greedy_T"][3] = runner_up

    def passed(dtype: str, margin: float) -> bool:
        logits_TS = stored.greedy_logits_TS.clone()
        logits_TS[3, runner_up] = logits_TS[3].max() - margin
        return judge(
            replace(stored, dtype=dtype, tolerance=5e-2, greedy_logits_TS=logits_TS), found, metadata
        )["passed"]

    assert passed("bfloat16", 1e-3)
    assert not passed("bfloat16", 1e-2)
    assert not passed("float32", 1e-3)


def test_not_a_number_fails(qwen: Exported) -> None:
    stored = read_reference(qwen.folder)
    found = {"logits_BLS": stored.reference_BLS * float("nan"), "greedy_T": stored.greedy_T}
    metadata = {"class": "", "cached_values": stored.cached_values, "problems": []}
    assert not judge(stored, found, metadata)["passed"]


@pytest.mark.parametrize("form", ["decoupled", "exact-rope"])
def test_large_models_are_checked_by_their_first_layers(form: str, tmp_path) -> None:
    if form == "decoupled":
        exported = export(tmp_path, tokenizer=False, layers=3)
        source, layers, out = exported.source, exported.layers, exported.folder
    else:
        path = pico_model(tmp_path / "source", tokenizer=False, layers=3)
        source, model, out = open_source(str(path)), load(path), tmp_path / "out"
        layers = exact_layers(model)
        write_latent_checkpoint(source, layers.__getitem__, out, torch.float32)
    store_reference(out, source, layers.__getitem__, token_ids(), num_greedy=4, num_layers=2)
    stored = read_reference(out)
    assert len(stored.cached_values) == 2
    whole_BLS = Reference(source, layers.__getitem__).logits(token_ids())
    assert relative_error(stored.reference_BLS, whole_BLS) > 0.1
    body = verify_here(out)
    assert body["passed"], body["problems"]


def test_folders_that_hold_no_converted_model(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json.*care convert"):
        verify(VerifyConfig(model=tmp_path))
    folder = pico_model(tmp_path / "source", tokenizer=False)
    with pytest.raises(CheckpointError, match=r"reference\.safetensors is missing.*care convert"):
        verify(VerifyConfig(model=folder))


def test_damaged_files(qwen: Exported) -> None:
    weights = qwen.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cannot load or run it.*care convert"):
        verify(VerifyConfig(model=qwen.folder))
    reference = qwen.folder / "care_reference" / "reference.safetensors"
    reference.write_bytes(reference.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cannot be read.*care convert"):
        verify(VerifyConfig(model=qwen.folder))
