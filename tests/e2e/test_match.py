"""`care convert --match-steps`: what is written, in every form and profile, and what comes after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from care_mla import ConvertConfig, HealConfig, convert, heal_model
from care_mla.configs import VerifyConfig
from care_mla.export.run import export_model
from care_mla.export.verify import verify
from care_mla.export_config import ExportConfig, ExportProfile
from e2e.conftest import make_input

from pico import pico_model

CASES: dict[str, dict[str, Any]] = {
    "decoupled": {"dtype": "bfloat16"},
    "decoupled-biases": {"model": "biased"},
    "decoupled-own-class": {"profile": "care"},
    "exact-rope": {"form": "exact-rope"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_input(tmp_path_factory.mktemp("match"))
    pico_model(folder / "biased", attention_bias=True)
    return folder


def converted(folder: Path, name: str) -> dict[str, Any]:
    """The result of a conversion of CASES, in the folder of its name."""
    options = {"model": "model"} | CASES[name]
    return convert(
        ConvertConfig(
            **(options | {"model": str(folder / options["model"])}),
            output=folder / name,
            work=folder / f"{options['model']}.work",  # calibrated once, for all
            calibration=str(folder / "calibration.txt"),
            calibration_tokens=1024,
            sequence_length=128,
            match_steps=20,
            match_tokens=4096,
            device="cpu",
            quiet=True,
            overwrite=True,
        )
    )


@pytest.fixture(scope="module")
def stock(folder: Path) -> Path:
    """A matched folder of a stock profile."""
    converted(folder, "decoupled")
    return folder / "decoupled"


@pytest.mark.parametrize("name", CASES)
def test_matched_models_pass_their_check(name: str, folder: Path) -> None:
    output = folder / name
    body = converted(folder, name)
    assert body["verify"]["passed"], body["verify"]["problems"]
    assert list(body["stages"]) == ["check", "calibrate", "choose", "factor", "match", "export", "verify"]
    assert (body["match"]["steps"], body["match"]["tokens"]) == (20, 4096)
    assert body["match"]["kept"] is True
    is_stock = body["profile"] != "care"
    assert body["match"]["heads_apart"] is is_stock
    kl = body["match"]["held_out_kl"]
    assert body["held_out_kl"] == kl["after"] < kl["before"]
    card = (output / "README.md").read_text(encoding="utf-8")
    assert (
        f"20 steps on 4,096 tokens, which took the divergence on held-out text from {kl['before']:.4f} to "
        in card
    )
    errors = [row["match"] for row in body["layers"]]
    assert errors[0]["error_after"] < errors[0]["error_before"]
    assert all(error["error_after"] <= error["error_before"] for error in errors)
    recipe = yaml.safe_load((output / "recipe.yaml").read_text())
    assert (recipe["match-steps"], recipe["match-tokens"]) == (20, 4096)
    if is_stock:
        # The heads of one KV head have become different.
        (weights,) = output.glob("*.safetensors")
        up_NXR = load_file(weights)["model.layers.0.self_attn.kv_b_proj.weight"].float().unflatten(0, (4, -1))
        assert not torch.allclose(up_NXR[0], up_NXR[1], rtol=0.05)


@pytest.mark.parametrize("profile", ["vllm", "deepseek-v2", "gguf"])
def test_matched_models_are_exported_to_every_profile(profile: ExportProfile, stock: Path) -> None:
    folder = stock.parent
    output = folder / (f"{profile}.gguf" if profile == "gguf" else profile)
    export_model(ExportConfig(model=stock, output=output, profile=profile, quiet=True))
    engine = "llama.cpp" if profile == "gguf" else "transformers"
    assert verify(VerifyConfig(model=output, engine=engine, quiet=True))["passed"]


def test_matched_models_heal(stock: Path) -> None:
    folder = stock.parent
    done = heal_model(
        HealConfig(
            model=stock,
            output=folder / "healed",
            teacher=str(folder / "model"),
            data=(str(folder / "calibration.txt"),),
            steps=4,
            batch_size=2,
            sequence_length=64,
            device="cpu",
            quiet=True,
        )
    )
    assert done is not None
    assert done["verify"]["passed"]
    assert done["held_out"]["after"] < done["held_out"]["before"]
