"""Every supported kind of model is converted and verified, in the stock form and in the exact one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from care_mla import ConvertConfig, console, convert
from care_mla.configs import Form

from pico import pico_model, pico_text

PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
MODELS: dict[str, dict[str, Any]] = {
    "llama-mha-untied": {"kv_heads": 4, "tied": False},
    "llama-gqa-llama3": {"rope": "llama3"},
    "llama-mqa-biases": {"kv_heads": 1, "attention_bias": True, "rms_norm_eps": 1e-6},
    "llama-mlp-bias": {"mlp_bias": True},
    "llama-wide-heads": {"heads": 2, "kv_heads": 1, "head_dim": 48, "tied": False},
    "mistral": {"family": "mistral", "tied": False},
    "mistral-window": {"family": "mistral", "sliding_window": 32},
    "mixtral": {"family": "mixtral", "tied": False},
    "mixtral-window": {"family": "mixtral", "sliding_window": 32},
    "phi3": {"family": "phi3"},
    "phi3-partial": {"family": "phi3", "rope": PARTIAL, "tied": False},
    "phi3-partial-window": {"family": "phi3", "rope": PARTIAL, "sliding_window": 32},
    "qwen2": {"family": "qwen2", "tied": False},
    "qwen3": {"family": "qwen3"},
    "qwen3_moe": {"family": "qwen3_moe", "tied": False},
    "qwen3-biases": {"family": "qwen3", "attention_bias": True, "tied": False},
    "olmo2": {"family": "olmo2"},
}
STOCK_PROFILES = {"mixtral": "mistral4", "qwen3_moe": "mistral4"}
# What DeepSeek's class cannot say, by the words of the warning.
OWN_CLASS = {
    "mistral-window": "sliding_window 32",
    "mixtral-window": "sliding_window 32",
    "phi3-partial-window": "sliding_window 32",
    "llama-mlp-bias": "mlp_bias",
}
EXACT_ALONE = ("olmo2",)


@pytest.mark.parametrize("name", MODELS)
def test_model_is_converted_in_its_forms(name: str, tmp_path: Path) -> None:
    pico_model(tmp_path / "model", **MODELS[name])
    (tmp_path / "text.txt").write_text(pico_text(5000))
    forms: tuple[Form, ...] = ("exact-rope",) if name in EXACT_ALONE else ("decoupled", "exact-rope")
    for form in forms:
        console.current().warnings.clear()
        body = convert(
            ConvertConfig(
                model=str(tmp_path / "model"),
                output=tmp_path / form,
                work=tmp_path / "work",
                calibration=str(tmp_path / "text.txt"),
                calibration_tokens=1024,
                sequence_length=128,
                form=form,
                device="cpu",
                quiet=True,
            )
        )
        verdict = body["verify"]
        assert verdict["passed"], verdict["problems"]
        assert verdict["relative_error"] < 2e-5
        assert body["cached_values"]["converted"] == body["cached_values"]["original"] / 2
        assert bool(body["needs_healing"]) is (form == "decoupled" and name.startswith("qwen3"))
        is_stock = form == "decoupled" and name not in OWN_CLASS
        assert body["profile"] == (STOCK_PROFILES.get(name, "deepseek-v3") if is_stock else "care")
        if form == "decoupled":
            warned = [text for text in console.current().warnings if "profile care" in text]
            assert bool(warned) is (name in OWN_CLASS)
            assert OWN_CLASS.get(name, "") in "".join(warned)
