"""Mixtures of experts in stock classes: exact where a profile says so, else refused; experts to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from care_mla import console
from care_mla.checkpoint.opening import open_source
from care_mla.checkpoint.source import Source
from care_mla.configs import PlanConfig, Profile
from care_mla.errors import ExportError
from care_mla.export import engine_transformers
from care_mla.export.converted import ConvertedFolder
from care_mla.export.hf import write_latent_checkpoint
from care_mla.export.profile import pick_profile
from care_mla.export.run import export_model
from care_mla.export.stock import write_deepseek_v2_checkpoint, write_mistral4_checkpoint
from care_mla.export.verify import judge, read_reference, store_reference
from care_mla.export_config import ExportConfig
from care_mla.mla.reference import Reference
from care_mla.plan import parameter_count, plan
from care_mla.profiles import check_profile, profile_blocker, stock_profile
from export_cases import decoupled_layer, relative_error, token_ids

from pico import pico_model

# torch says so of the shared expert that Mistral 4's class insists on, 0 wide.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
WRITERS: dict[Profile, Callable[..., dict[str, Any]]] = {
    "mistral4": write_mistral4_checkpoint,
    "deepseek-v2": write_deepseek_v2_checkpoint,
    "care": write_latent_checkpoint,
}


def sparse_source(tmp_path: Path, **facts: Any) -> Source:
    """A pico Mixtral, whose router and layers may be taken for another's."""
    source = open_source(
        str(pico_model(tmp_path / "source", "mixtral", layers=3, tied=False, tokenizer=False))
    )
    source.facts = replace(source.facts, **facts)
    return source


def written(source: Source, profile: Profile, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    def layer(layer_idx: int) -> Any:
        return decoupled_layer(source, layer_idx)

    WRITERS[profile](source, layer, folder, dtype)
    store_reference(folder, source, layer, token_ids(), num_greedy=8)
    return folder


def verified(folder: Path) -> dict[str, Any]:
    return judge(read_reference(folder), *engine_transformers.run(folder))


@pytest.mark.parametrize(
    ("profile", "norm_topk_prob", "name"),
    [
        ("mistral4", True, "Mistral4ForCausalLM"),
        ("mistral4", False, "Mistral4ForCausalLM"),
        ("deepseek-v2", False, "DeepseekV2ForCausalLM"),
        ("care", True, "LatentMixtralForCausalLM"),
    ],
)
def test_every_engine_class_that_is_called_exact_is(
    profile: Profile, norm_topk_prob: bool, name: str, tmp_path: Path
) -> None:
    source = sparse_source(tmp_path, norm_topk_prob=norm_topk_prob)
    assert profile_blocker(source.facts, profile) is None
    body = verified(written(source, profile, tmp_path / "out"))
    assert body["passed"], body["problems"]
    assert body["class"] == name
    assert body["relative_error"] < 1e-5


def test_the_router_that_transformers_does_not_have_is_another_model(tmp_path: Path) -> None:
    source = sparse_source(tmp_path)
    body = verified(written(source, "deepseek-v2", tmp_path / "out"))
    assert not body["passed"]
    assert body["relative_error"] > 1e-2


@pytest.mark.parametrize("profile", ["mistral4", "deepseek-v2", "care"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_pass_through_to_the_bit(profile: Profile, dtype: torch.dtype, tmp_path: Path) -> None:
    source = sparse_source(tmp_path)
    assert source.facts.rms_norm_eps == 1e-5  # so that the residual stream is scaled
    written(source, profile, tmp_path / "out", dtype)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for layer_idx in range(3):
        prefix = f"model.layers.{layer_idx}.mlp."
        assert torch.equal(stored[f"{prefix}gate.weight"], source.tensor(f"{prefix}gate.weight").to(dtype))
        for e in range(4):
            if profile == "deepseek-v2":
                parts = [stored[f"{prefix}experts.{e}.{name}_proj.weight"] for name in ("gate", "up", "down")]
            else:
                down_DI = stored[f"{prefix}experts.down_proj"][e]
                parts = [*stored[f"{prefix}experts.gate_up_proj"][e].chunk(2), down_DI]
            for name, part in zip(("gate", "up", "down"), parts, strict=True):
                assert torch.equal(part, source.tensor(f"{prefix}experts.{e}.{name}_proj.weight").to(dtype))


@pytest.mark.parametrize("first", ["mistral4", "care"])
def test_a_converted_folder_is_exported_again(first: Profile, tmp_path: Path) -> None:
    source = sparse_source(tmp_path)
    folder = written(source, first, tmp_path / "first")
    model = ConvertedFolder(folder)
    model.check()
    found_BLS = Reference(model, model.latent_layer).logits(token_ids())
    assert relative_error(found_BLS, read_reference(folder).reference_BLS) < 1e-6
    export_model(ExportConfig(model=folder, output=tmp_path / "again", profile="mistral4", quiet=True))
    body = verified(tmp_path / "again")
    assert body["passed"], body["problems"]
    assert body["relative_error"] < 1e-5
    console.current().warnings.clear()
    body = export_model(ExportConfig(model=folder, output=tmp_path / "v2", profile="deepseek-v2", quiet=True))
    assert body["check"].endswith("--engine vllm")
    assert "vLLM or SGLang alone" in "".join(console.current().warnings)
    config = json.loads((tmp_path / "v2" / "config.json").read_text())
    assert config["norm_topk_prob"] is True
    assert config["scoring_func"] == "softmax"
    shared = load_file(tmp_path / "v2" / "model.safetensors")[
        "model.layers.0.mlp.shared_experts.up_proj.weight"
    ]
    assert shared.shape == (48, 64)
    assert not shared.any()
    with pytest.raises(ExportError, match=r"sigmoid.*--profile mistral4"):
        export_model(ExportConfig(model=folder, output=tmp_path / "v3", profile="deepseek-v3", quiet=True))


def test_the_profile_is_picked_by_the_router(tmp_path: Path) -> None:
    facts = sparse_source(tmp_path).facts
    assert stock_profile(facts)[0] == "mistral4"
    assert stock_profile(replace(facts, norm_topk_prob=False))[0] == "deepseek-v2"
    assert stock_profile(replace(facts, sparse_layers=frozenset({2})))[0] == "mistral4"
    config = PlanConfig(model="")
    assert pick_profile(facts, config) == "mistral4"
    assert pick_profile(facts, replace(config, form="exact-rope")) == "care"


@pytest.mark.parametrize(
    ("change", "profile", "engine", "reason"),
    [
        ({}, "deepseek-v3", "vLLM", "sigmoid"),
        ({}, "deepseek-v2", "transformers", "norm_topk_prob"),
        ({}, "deepseek-v2", "vLLM", None),
        ({}, "deepseek-v2", "SGLang", None),
        ({"norm_topk_prob": False}, "deepseek-v2", "transformers", None),
        ({}, "mistral4", "vLLM", "no class"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "mistral4", "transformers", "llama3"),
        ({"sparse_layers": frozenset({0, 2})}, "mistral4", "transformers", "dense layers behind"),
        ({"sliding_window": 32}, "mistral4", "transformers", "sliding_window 32"),
        ({"num_experts": 1}, "mistral4", "transformers", "num_experts 1"),
    ],
)
def test_what_a_router_cannot_say_is_known_before_any_work(
    change: dict[str, Any], profile: Profile, engine: str, reason: str | None, tmp_path: Path
) -> None:
    facts = replace(sparse_source(tmp_path).facts, **change)
    blocker = profile_blocker(facts, profile, engine=engine)
    assert blocker is None if reason is None else reason in str(blocker)
    if reason is not None and engine == "transformers":
        with pytest.raises(ExportError, match=reason):
            check_profile(facts, profile)


def test_a_dense_model_can_be_a_mistral4(tmp_path: Path) -> None:
    source = open_source(str(pico_model(tmp_path / "source", tokenizer=False)))
    body = verified(written(source, "mistral4", tmp_path / "out"))
    assert body["passed"], body["problems"]


def test_sizes_count_every_expert_and_time_only_those_used(tmp_path: Path) -> None:
    source = sparse_source(tmp_path)
    values = sum(torch.Size(source.shape(name)).numel() for name in source.names())
    assert parameter_count(source.facts) == values

    def flops(**change: int) -> float:
        return plan(replace(source.facts, **change), PlanConfig(model="")).flops

    # A router's row is all that an expert costs a token that does not use it.
    idle, used = flops(num_experts=5) - flops(), flops(num_experts_per_tok=3) - flops()
    assert 3 * 48 * idle == pytest.approx(used)
    assert parameter_count(replace(source.facts, num_experts=5)) == values + 3 * (64 + 3 * 48 * 64)
