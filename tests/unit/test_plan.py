"""Ranks from budgets, and the plan's arithmetic on published configurations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from care_mla.budget import Dims, cached_values, resolve_dims
from care_mla.configs import ConvertConfig, PlanConfig
from care_mla.errors import ExportError, OptionError
from care_mla.facts import ModelFacts
from care_mla.families import facts_from_config
from care_mla.matching_plan import matching_tokens
from care_mla.plan import (
    GIB,
    parameter_count,
    plan,
    resolve_calibration,
    rotation_length,
    spool,
)
from care_mla.profiles import profile_blocker

from pico import pico_model

SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def facts_of(config: dict[str, Any], **changes: Any) -> ModelFacts:
    return replace(facts_from_config(config), **changes)


def dims(facts: ModelFacts, form: Any = "decoupled", method: str = "fisher", **options: Any) -> list[Dims]:
    return resolve_dims(
        facts, PlanConfig(model="", form=form, method=method, **options), form=form, method=method
    )


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1.0, [(320, 64), (352, 32), (368, 16), (376, 8)]),
        (0.5, [(128, 64), (160, 32), (176, 16), (184, 8)]),
        (0.25, [(32, 64), (64, 32), (80, 16), (88, 8)]),
        (0.125, [(16, 32), (32, 16), (40, 8)]),
    ],
)
def test_decoupled_budgets_of_the_demo(budget: float, expected: list[tuple[int, int]]) -> None:
    facts = facts_of(SMOLLM2)
    found = dims(facts, budget=budget)
    assert found == expected
    assert {cached_values(facts, "decoupled", d) for d in found} == {int(budget * 384)}


def test_wide_heads_keep_the_rope_key_within_what_kernels_are_built_for() -> None:
    facts = facts_of(LLAMA_8B)
    assert dims(facts, budget=0.5) == [(960, 64), (992, 32), (1008, 16)]
    assert dims(facts, budget=0.5, qk_rope_head_dim=128) == [(896, 128)]


@pytest.mark.parametrize("config", [SMOLLM2, LLAMA_8B, LLAMA_70B])
@pytest.mark.parametrize("budget", [0.1, 0.3, 1 / 3, 0.77, 1.0])
@pytest.mark.parametrize(
    ("form", "method"),
    [
        ("decoupled", "fisher"),
        ("exact-rope", "joint"),
        ("exact-rope", "svd"),
        ("partial-rope", "mha2mla-split"),
    ],
)
def test_no_candidate_is_above_the_budget_or_wastes_it(
    config: dict[str, Any], budget: float, form: Any, method: str
) -> None:
    facts = facts_of(config)
    try:
        found = dims(facts, form=form, method=method, budget=budget)
    except OptionError:
        assert form == "partial-rope"
        assert budget < 0.2
        return
    for d in found:
        left = budget * facts.cached_values - cached_values(facts, form, d)
        assert -1e-6 <= left < 2
        assert d.qk_rope_head_dim % 2 == 0
        assert form == "exact-rope" or d.kv_lora_rank % 2 == 0


def test_rank_never_exceeds_what_keys_and_values_have() -> None:
    facts = facts_of(SMOLLM2 | {"num_key_value_heads": 9})  # cached 1152 > hidden 576
    assert dims(facts, budget=1.0)[0] == (576, 64)
    assert dims(facts, form="exact-rope", method="joint", budget=1.0) == [(576, 0)]
    assert dims(facts, form="exact-rope", method="svd", budget=1.0) == [(1152, 0)]
    with pytest.raises(OptionError, match="full rank 576"):
        dims(facts, kv_lora_rank=600, qk_rope_head_dim=64)


@pytest.mark.parametrize(
    ("form", "method", "options", "message"),
    [
        ("decoupled", "fisher", {"budget": 0.01}, "Try --budget 0.027"),
        ("decoupled", "fisher", {"budget": 0.5, "qk_rope_head_dim": 48}, "Choose one of: 64, 32, 16, 8"),
        ("decoupled", "fisher", {"kv_lora_rank": 384, "qk_rope_head_dim": 64}, "Try --kv-lora-rank 320"),
        ("exact-rope", "svd", {"kv_lora_rank": 101}, "Try --kv-lora-rank 100"),
        ("partial-rope", "mha2mla-joint", {"budget": 0.05}, "Try --budget 0.066"),
    ],
)
def test_impossible_sizes_name_the_nearest_possible(
    form: Any, method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError) as error:
        dims(facts_of(SMOLLM2), form=form, method=method, **options)
    assert message in str(error.value)


def test_the_budget_that_a_refusal_proposes_works() -> None:
    assert dims(facts_of(SMOLLM2), budget=0.027) == [(2, 8)]
    assert dims(facts_of(SMOLLM2), form="partial-rope", method="mha2mla-joint", budget=0.066) == [(1, 8)]


def test_calibration_defaults_depend_on_the_device_and_the_model() -> None:
    facts, config = facts_of(SMOLLM2), PlanConfig(model="")
    assert resolve_calibration(facts, config, device="cpu") == (8192, 256)
    assert resolve_calibration(facts, config, device="cuda:0") == (65536, 2048)
    short = facts_of(SMOLLM2, max_position_embeddings=128)
    assert resolve_calibration(short, config, device="cuda") == (65536, 128)
    few = PlanConfig(model="", calibration_tokens=100)
    assert resolve_calibration(facts, few, device="cpu") == (100, 100)
    with pytest.raises(OptionError, match="longer than the model's 128 positions"):
        resolve_calibration(short, PlanConfig(model="", sequence_length=256), device="cpu")
    with pytest.raises(OptionError, match="longer than all calibration tokens"):
        resolve_calibration(facts_of(LLAMA_8B), PlanConfig(model="", sequence_length=16384), device="cpu")


def test_rotation_length_halves_until_it_fits() -> None:
    facts = facts_of(LLAMA_8B)
    assert rotation_length(facts, None) == 4096
    assert rotation_length(facts_of(SMOLLM2, max_position_embeddings=1024), None) == 1024
    lengths = [rotation_length(facts, gib * GIB) for gib in (64, 8, 4)]
    assert lengths == [4096, 2048, 1024]


def test_spool_stays_within_its_budget_and_covers_all_tokens() -> None:
    facts = facts_of(LLAMA_70B)
    small = spool(facts, tokens=65536, sequence_length=2048, max_spool_gib=16)
    assert small.nbytes <= 16 * GIB
    assert small.chunks * small.chunk_sequences >= 32 > (small.chunks - 1) * small.chunk_sequences
    large = spool(facts, tokens=65536, sequence_length=2048, max_spool_gib=1000)
    assert (large.chunks, large.chunk_sequences) == (1, 32)
    with pytest.raises(OptionError, match="--max-spool-gib 5"):
        spool(facts, tokens=65536, sequence_length=2048, max_spool_gib=5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_parameters_equal_those_of_the_model_that_transformers_builds(tmp_path: Path, family: str) -> None:
    import json

    from safetensors import safe_open

    folder = pico_model(tmp_path / "pico", family, tied=False)
    facts = facts_from_config(json.loads((folder / "config.json").read_text()))
    with safe_open(folder / "model.safetensors", "pt") as file:
        count = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert parameter_count(facts) == count


def test_parameters_of_published_models() -> None:
    assert parameter_count(facts_of(SMOLLM2)) == 134_515_008
    assert parameter_count(facts_of(LLAMA_8B)) == 8_030_261_248
    assert parameter_count(facts_of(LLAMA_70B)) == 70_553_706_496


def test_plan_of_a_70b_model_fits_one_gpu_and_says_what_it_needs() -> None:
    result = plan(
        facts_of(LLAMA_70B),
        PlanConfig(model="", calibration="text.txt"),
        device="cuda",
        memory_bytes=80 * GIB,
    )
    assert result.memory_bytes < 80 * GIB
    assert result.cached_values == {"original": 2048, "converted": 1024}
    assert result.cache_bytes_per_token == {"original": 327_680, "converted": 163_840}
    assert result.disk["layer inputs"] <= 16 * GIB
    assert result.disk["output"] == 2 * result.parameters["converted"]
    assert result.chunks > 1
    assert result.warnings == []
    body = result.as_json()
    assert body["memory_bytes"] == sum(body["memory"].values())
    assert body["candidates"][0] == {"kv_lora_rank": 960, "qk_rope_head_dim": 64}


def test_memory_does_not_grow_with_depth() -> None:
    config = PlanConfig(model="", calibration="text.txt", max_spool_gib=1000)
    one = plan(facts_of(LLAMA_8B), config)
    two = plan(facts_of(LLAMA_8B, num_hidden_layers=64), config)
    assert one.memory == two.memory
    assert two.flops > 1.8 * one.flops


def test_few_tokens_warn_that_damping_decides() -> None:
    result = plan(facts_of(LLAMA_8B), PlanConfig(model="", calibration_tokens=1024))
    assert any("fewer than hidden_size 4096" in warning for warning in result.warnings)
    short = plan(facts_of(LLAMA_8B), PlanConfig(model=""), memory_bytes=4 * GIB)
    assert any("RoPE statistics to 1024" in warning for warning in short.warnings)


def test_stock_profile_is_refused_where_it_cannot_express_the_model() -> None:
    window = facts_of(SMOLLM2, sliding_window=1024)
    assert profile_blocker(window, "care") is None
    with pytest.raises(ExportError, match="sliding_window 1024"):
        plan(window, ConvertConfig(model="", output=Path("o"), profile="deepseek-v3"))
    assert "mlp_bias" in str(profile_blocker(facts_of(SMOLLM2, mlp_bias=True), "deepseek-v3"))
    biased = facts_of(SMOLLM2, q_bias=True)
    assert profile_blocker(biased, "deepseek-v3") is None
    assert "ignores" in str(profile_blocker(biased, "deepseek-v3", engine="vLLM"))


def test_block_matching_is_counted() -> None:
    facts = facts_of(LLAMA_8B)
    without = plan(facts, PlanConfig(model="", calibration="text.txt"))
    config = PlanConfig(model="", calibration="text.txt", match_steps=40, match_tokens=32_768)
    matched = plan(facts, config)
    # The hidden states of two models at two layers.
    assert matched.disk["streams to match"] == 4 * 4 * 4096 * 32_768
    assert matched.disk["matched layers"] == matched.disk["factors"]
    # Adam's two moments alone take twice a layer's weights.
    assert matched.memory_bytes - without.memory_bytes > 2 * matched.disk["factors"] / 32
    assert matched.flops > without.flops
    deep = plan(facts_of(LLAMA_8B, num_hidden_layers=64), config)
    assert deep.memory["block matching"] == matched.memory["block matching"]
    assert matched.memory["block matching"] > matched.disk["streams to match"]
    assert matching_tokens(replace(config, match_tokens=None), 8192) == 40 * 512
    assert matching_tokens(replace(config, match_tokens=None), 98_304) == 98_304
    # Beyond, they come again.
    assert matching_tokens(replace(config, match_tokens=None, match_steps=512), 8192) == 65_536
    with pytest.raises(OptionError, match=r"--match-tokens 16384, or --max-spool-gib 2.0"):
        plan(facts, replace(config, max_spool_gib=1.0))
    with pytest.raises(OptionError, match="no effect without --match-steps"):
        PlanConfig(model="", match_tokens=8192)
