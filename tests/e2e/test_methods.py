"""Every method in every form becomes a checkpoint that loads and is verified."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from care_mla import ConvertConfig, convert
from care_mla.configs import METHOD_ALLOCATION, METHODS, Form
from care_mla.evaluate.cache import live_cache
from care_mla.evaluate.models import open_model
from e2e.conftest import make_input

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_input(tmp_path_factory.mktemp("methods"))


@dataclass(frozen=True)
class Case:
    method: str
    form: Form

    def __str__(self) -> str:
        return f"{self.form} {self.method}"


@pytest.mark.parametrize(
    "case", [Case(method, form) for form, methods in METHODS.items() for method in methods], ids=str
)
def test_method_becomes_a_checkpoint(case: Case, folder: Path) -> None:
    output = folder / f"{case.form}-{case.method}"
    body = convert(
        ConvertConfig(
            model=str(folder / "model"),
            output=output,
            work=folder / "work",  # calibrated once, for all
            calibration=str(folder / "calibration.txt"),
            calibration_tokens=1024,
            sequence_length=128,
            form=case.form,
            method=case.method,
            device="cpu",
            quiet=True,
        )
    )
    assert body["verify"]["passed"], body["verify"]["problems"]
    per_layer = case.method in METHOD_ALLOCATION
    stock = case.form == "decoupled" and not per_layer
    assert body["profile"] == ("deepseek-v3" if stock else "care")
    model_type = json.loads((output / "config.json").read_text())["model_type"]
    assert model_type == ("deepseek_v3" if stock else "care_latent_llama")
    ranks = [row["rank"] for row in body["layers"]]
    if per_layer:
        assert len(set(ranks)) > 1
    opened = open_model(str(output), device=CPU, trust_remote_code=False)
    values = live_cache(opened.load()).cached_values
    assert values == pytest.approx(body["cached_values"]["converted"])
    assert 0.9 * 32 <= values <= 32
    assert body["cached_values"]["original"] == 64
