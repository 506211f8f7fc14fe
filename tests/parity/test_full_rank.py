"""At full rank a conversion is the original: every method that can be exact, through all steps."""
# Shapes: B sequences, L positions, S vocabulary.

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from care_mla import ConvertConfig, console, convert
from care_mla.calibrate.layers import LayerStack
from care_mla.calibrate.run import calibrate
from care_mla.checkpoint.opening import open_source
from care_mla.checkpoint.source import Source
from care_mla.configs import METHODS, Form
from care_mla.decompose.layer_inputs import CalibratedLayers
from care_mla.decompose.methods import method_function, variants
from care_mla.mla.choose import spread
from care_mla.mla.divergence import measure
from care_mla.mla.reference import Reference
from care_mla.workspace import Workspace
from export_cases import relative_error, token_ids

from pico import pico_model, pico_text

CPU = torch.device("cpu")
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-mha-llama3": {"kv_heads": 2, "heads": 2, "rope": "llama3", "tied": False},
    "yarn": {"rope": "yarn"},
    "longrope": {"rope": "longrope"},
    "linear": {"rope": "linear"},
    "qwen2": {"family": "qwen2"},
    "mistral-window": {"family": "mistral", "sliding_window": 16},
    "mixtral": {"family": "mixtral"},
    "phi3-partial": {"family": "phi3", "rope": PARTIAL},
}
NORMED: dict[str, dict[str, Any]] = {
    "qwen3": {"family": "qwen3", "attention_bias": True},
    "olmo2": {"family": "olmo2", "rope": "llama3", "tied": False},
}
ONE_KEY_HEAD: dict[str, dict[str, Any]] = {
    "llama": {"kv_heads": 1},
    "qwen2": {"family": "qwen2", "kv_heads": 1},
    "phi3-partial": {"family": "phi3", "kv_heads": 1, "rope": PARTIAL},
    "yarn": {"kv_heads": 1, "rope": "yarn"},
    "longrope": {"kv_heads": 1, "rope": "longrope"},
    "linear": {"kv_heads": 1, "rope": "linear"},
}


@dataclass(frozen=True)
class Calibrated:
    """A calibrated model and the options of its conversions at full rank."""

    source: Source
    stack: LayerStack
    inputs: CalibratedLayers
    config: ConvertConfig


def calibrated(folder: Path, **options: Any) -> Calibrated:
    pico_model(folder / "model", **options)
    (folder / "text.txt").write_text(pico_text(5000))
    config = ConvertConfig(
        model=str(folder / "model"),
        output=folder / "OUT",
        work=folder / "work",
        budget=1.0,
        calibration=str(folder / "text.txt"),
        calibration_tokens=1024,
        sequence_length=128,
        form="exact-rope",
        device="cpu",
        quiet=True,
    )
    source = open_source(config.model)
    stack = LayerStack(source, device=CPU)
    workspace = Workspace(folder / "work")
    console.set_quiet(True)
    calibrate(stack, config, workspace, console.current())
    console.set_quiet(False)
    inputs = CalibratedLayers(source, workspace, stack.inv_freq_F, damping=config.damping, device=CPU)
    return Calibrated(source, stack, inputs, config)


def logits(case: Calibrated, form: Form, method: str, tokens_BL: Tensor) -> Tensor:
    """Logits of the widest RoPE key and every rank."""
    variant = variants(case.source.facts, case.config, form=form, method=method)[0]
    choice = spread(variant, "uniform", case.stack.num_layers)
    factor = method_function(variant)
    return Reference(case.source, lambda i: factor(case.inputs[i]).cut(choice.ranks[i])).logits(tokens_BL)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    return calibrated(tmp_path_factory.mktemp("full"), **MODELS[request.param])


@pytest.fixture(scope="module", params=NORMED)
def normed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    return calibrated(tmp_path_factory.mktemp("normed"), **NORMED[request.param])


@pytest.fixture(scope="module", params=ONE_KEY_HEAD)
def one_key_head(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    return calibrated(tmp_path_factory.mktemp("one"), **ONE_KEY_HEAD[request.param])


@pytest.mark.parametrize("method", METHODS["exact-rope"])
def test_exact_rope_at_full_rank_is_the_original(method: str, model: Calibrated) -> None:
    tokens_BL = token_ids()
    original_BLS = Reference(model.source, None).logits(tokens_BL)
    assert relative_error(logits(model, "exact-rope", method, tokens_BL), original_BLS) < 1e-6


@pytest.mark.parametrize("method", METHODS["exact-rope"])
def test_exact_rope_keeps_qk_norm(method: str, normed: Calibrated) -> None:
    test_exact_rope_at_full_rank_is_the_original(method, normed)


# X-EcoMLA's start pairs other rows than the source's RoPE does, so healing has to come after it at any rank.
@pytest.mark.parametrize("method", [name for name in METHODS["decoupled"] if name != "x-ecomla"])
def test_one_key_head_that_keeps_rope_is_the_original(method: str, one_key_head: Calibrated) -> None:
    tokens_BL = token_ids()
    original_BLS = Reference(one_key_head.source, None).logits(tokens_BL)
    found = relative_error(logits(one_key_head, "decoupled", method, tokens_BL), original_BLS)
    assert found < 1e-6


@pytest.mark.parametrize("method", METHODS["decoupled"])
def test_several_key_heads_lose_something(method: str, model: Calibrated) -> None:
    # One RoPE key for two heads cannot be exact: an error of zero would mean that nothing was converted.
    tokens_BL = token_ids()
    original_BLS = Reference(model.source, None).logits(tokens_BL)
    assert relative_error(logits(model, "decoupled", method, tokens_BL), original_BLS) > 1e-3


def test_the_measure_finds_no_divergence_at_full_rank(model: Calibrated) -> None:
    variant = variants(model.source.facts, model.config, form="exact-rope", method="joint")[0]
    candidate = spread(variant, "uniform", model.stack.num_layers).layer(model.inputs)
    original, measured = measure(model.stack, {"joint": candidate}, token_ids())
    assert measured["joint"].mean_kl == pytest.approx(0, abs=1e-6)
    assert measured["joint"].perplexity == pytest.approx(original.perplexity, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("exact-rope", {}),
        ("exact-rope", {"family": "qwen3"}),
        ("exact-rope", {"family": "olmo2"}),
        ("decoupled", {"kv_heads": 1}),
        ("decoupled", {"kv_heads": 1, "rope": "yarn"}),
    ],
)
def test_written_at_full_rank_is_the_original(form: Form, options: dict[str, Any], tmp_path: Path) -> None:
    pico_model(tmp_path / "model", **options)
    (tmp_path / "text.txt").write_text(pico_text(5000))
    config = ConvertConfig(
        model=str(tmp_path / "model"),
        output=tmp_path / "OUT",
        budget=1.0,
        qk_rope_head_dim=16 if form == "decoupled" else None,
        calibration=str(tmp_path / "text.txt"),
        calibration_tokens=1024,
        sequence_length=128,
        form=form,
        device="cpu",
        quiet=True,
    )
    body = convert(config)
    assert body["verify"]["passed"], body["verify"]["problems"]
    assert body["verify"]["kl_to_original"] == pytest.approx(0, abs=1e-6)
    tokens_BL = token_ids()
    converted_BLS, original_BLS = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=ours)(
            tokens_BL
        ).logits
        for folder, ours in ((config.output, form == "exact-rope"), (config.model, False))
    )
    torch.testing.assert_close(converted_BLS, original_BLS, rtol=0, atol=1e-4)
