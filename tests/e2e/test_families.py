"""Every supported kind of model is converted and verified, in the stock form and in the exact one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

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
    "qwen2-yarn": {"family": "qwen2", "rope": "yarn"},
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


def convert_decoupled(folder: Path, **options: Any) -> dict[str, Any]:
    (folder / "text.txt").write_text(pico_text(5000))
    return convert(
        ConvertConfig(
            model=str(folder / "model"),
            output=folder / "OUT",
            calibration=str(folder / "text.txt"),
            calibration_tokens=1024,
            sequence_length=128,
            device="cpu",
            quiet=True,
            **options,
        )
    )


def test_scaled_rope_runs_in_every_engine_at_a_stated_cost(tmp_path: Path) -> None:
    pico_model(tmp_path / "model", rope="llama3", tied=False)
    body = convert_decoupled(tmp_path, rope_table="plain")
    assert body["verify"]["passed"], body["verify"]["problems"]
    assert body["verify"]["class"] == "DeepseekV3ForCausalLM"
    assert body["verify"]["relative_error"] < 1e-4
    config = json.loads((tmp_path / "OUT" / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert set(body["engines"].values()) == {True}
    assert body["rope"]["type"] == "llama3"
    assert body["rope"]["table"] == "plain"
    assert body["rope"]["kl"]["plain"] == body["held_out_kl"]
    assert body["needs_healing"] == []
    card = (tmp_path / "OUT" / "README.md").read_text()
    for table in ("scaled", "plain"):
        assert f"| 0 | {body['rope']['kl'][table]:.4g} |" in card
    assert "- llama.cpp: yes" in card


def test_absorbed_biases_are_gone_at_a_stated_cost(tmp_path: Path) -> None:
    pico_model(tmp_path / "model", "qwen2")
    body = convert_decoupled(tmp_path, biases="absorb", qk_rope_head_dim=8)
    assert body["verify"]["passed"], body["verify"]["problems"]
    config = json.loads((tmp_path / "OUT" / "config.json").read_text())
    assert config["attention_bias"] is False
    assert config["q_lora_rank"] is None
    with safe_open(tmp_path / "OUT" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if name.endswith("bias")]  # noqa: SIM118
    # The model is tied, which vLLM's class is not.
    assert "profile vllm writes" in body["engines"].pop("vllm")
    assert set(body["engines"].values()) == {True}
    assert body["biases"]["option"] == "absorb"
    assert body["biases"]["kl"]["absorb"] == body["held_out_kl"]
    assert body["biases"]["kl"]["absorb"] != body["biases"]["kl"]["keep"]
    (reason,) = body["needs_healing"]
    assert "biases" in reason
    assert f"{max(row['constant_error'] for row in body['layers']):.2g}" in reason
    assert reason in (tmp_path / "OUT" / "README.md").read_text()


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
