"""Sizes for vLLM's kernels: the table of kernels, head dims with zeros, and ranks from a budget."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from care_mla.budget import Dims
from care_mla.configs import PlanConfig
from care_mla.errors import ExportError, OptionError
from care_mla.facts import ModelFacts
from care_mla.serving import fit_vllm, kernel_warnings, kernels, padded_head_dims, vllm_dims

FACTS = ModelFacts(
    family="llama", architecture="LlamaForCausalLM", model_type="llama", hidden_size=4096,
    intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, vocab_size=128256, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=5e5,
    rope_parameters={"rope_type": "default", "rope_theta": 5e5}, tie_word_embeddings=False, rotary_dim=128,
)  # fmt: skip
SMALL = replace(
    FACTS, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, head_dim=64, rotary_dim=64
)


@pytest.mark.parametrize(
    ("size", "running"),
    [
        (
            (512, 64, 128, 128),
            {"FLASH_ATTN_MLA", "FLASHMLA", "FLASHINFER_MLA", "CUTLASS_MLA", "TRITON_MLA", "CPU_MLA"}
            | {"FLASH_ATTN", "CPU_SDPA"},
        ),
        ((256, 64, 64, 128), {"FLASHINFER_MLA", "TRITON_MLA", "FLASH_ATTN", "CPU_SDPA"}),
        # 576 values, but not as 512 + 64.
        ((544, 32, 64, 64), {"TRITON_MLA", "CPU_SDPA"}),
        ((128, 64, 64, 64), {"TRITON_MLA", "CPU_SDPA"}),
        (
            (512, 64, 256, 256),
            {"FLASH_ATTN_MLA", "FLASHMLA", "CUTLASS_MLA", "TRITON_MLA", "CPU_MLA", "CPU_SDPA"},
        ),
    ],
)
def test_which_kernels_take_a_size(size: tuple[int, int, int, int], running: set[str]) -> None:
    rows = kernels(*size)
    assert {row.name for row in rows if row.runs} == running
    assert all(row.reason and "here" in row.reason for row in rows if not row.runs)


def test_a_size_is_warned_about_where_kernels_are_missing() -> None:
    assert kernel_warnings(kernels(512, 64, 128, 128)) == []
    (decode,) = kernel_warnings(kernels(256, 64, 64, 128))
    assert "FLASHINFER_MLA on Blackwell" in decode
    assert "--attention-backend TRITON_MLA" in decode
    prefill, decode = kernel_warnings(kernels(128, 64, 64, 64))
    assert "no prefill kernel" in prefill
    assert "(64, 64, 64)" in prefill
    assert "Blackwell" not in decode


@pytest.mark.parametrize(
    ("given", "padded"),
    [
        ((64, 64, 64), (64, 64, 128)),
        ((128, 64, 128), (128, 64, 128)),
        ((96, 16, 96), (128, 64, 128)),
        ((0, 64, 128), (64, 64, 128)),
        ((64, 32, 192), (192, 64, 256)),
    ],
)
def test_head_dims_are_the_smallest_that_hold_them(given, padded) -> None:
    assert padded_head_dims(*given) == padded


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((96, 48, 96), "RoPE key of width 48.*Choose --qk-rope-head-dim 64.*deepseek-v3"),
        ((256, 64, 256), r"\(256, 64, 256\).*wider than.*\(192, 64, 256\).*Choose --profile deepseek-v3"),
    ],
)
def test_head_dims_that_no_kernel_holds(given, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        padded_head_dims(*given)


def fit(facts: ModelFacts, **options: Any) -> tuple[Dims, list[str]]:
    config, warnings = fit_vllm(facts, PlanConfig(model="", profile="vllm", **options))
    assert config.budget is None
    assert config.kv_lora_rank is not None
    assert config.qk_rope_head_dim is not None
    return Dims(config.kv_lora_rank, config.qk_rope_head_dim), warnings


@pytest.mark.parametrize(
    ("facts", "options", "expected", "warned"),
    [
        (FACTS, {"budget": 0.3}, (512, 64), None),
        (FACTS, {"budget": 0.35}, (512, 64), None),
        (FACTS, {"budget": 0.2813}, (512, 64), None),
        (FACTS, {"budget": 0.17}, (256, 64), "FLASHINFER_MLA on Blackwell"),
        (FACTS, {"budget": 0.5}, (960, 64), "--budget 0.2813 .512 . 64 = 576 values. or --budget 0.1563"),
        (FACTS, {"budget": 0.1}, (140, 64), "--budget 0.2813"),
        (FACTS, {"kv_lora_rank": 512, "qk_rope_head_dim": 64}, (512, 64), None),
        (FACTS, {"kv_lora_rank": 300, "qk_rope_head_dim": 32}, (300, 32), "zeros up to 64, .*364 values"),
        (SMALL, {"budget": 0.85}, (256, 64), "TRITON_MLA"),
        (SMALL, {"budget": 0.5}, (128, 64), r"--budget 0.8334 \(256 \+ 64 = 320 values\)\.$"),
        (replace(SMALL, head_dim=32, rotary_dim=32), {"budget": 0.5}, (32, 32), "zeros up to 64"),
    ],
)
def test_ranks_hit_a_fast_size_where_the_budget_is_near(facts, options, expected, warned) -> None:
    dims, warnings = fit(facts, **options)
    assert dims == expected
    if warned is None:
        assert warnings == []
    else:
        assert any(re.search(warned, warning) for warning in warnings), warnings
    if "budget" in options:
        assert sum(vllm_dims(facts, dims)[0]) <= options["budget"] * facts.cached_values


def test_other_profiles_are_left_alone() -> None:
    config = PlanConfig(model="", budget=0.3)
    assert fit_vllm(FACTS, config) == (config, [])


def test_budgets_and_models_without_a_size() -> None:
    with pytest.raises(OptionError, match=r"leaves 20, too few.*Try --budget 0\.033 or more"):
        fit(FACTS, budget=0.01)
    with pytest.raises(OptionError, match=r"leaves 38,.*needs 64.*Try --budget 0\.3438 or more"):
        fit(replace(SMALL, head_dim=32, rotary_dim=32), budget=0.2)
    with pytest.raises(ExportError, match="width 12"):
        fit(replace(FACTS, head_dim=96, rotary_dim=96), budget=0.3)
    with pytest.raises(ExportError, match="wider than"):
        fit(replace(FACTS, head_dim=256), budget=0.3)
