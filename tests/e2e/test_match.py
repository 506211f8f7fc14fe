"""`care convert --match-steps`: what is written, in every form and profile, and what the JSON says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from care_mla import ConvertConfig, convert
from care_mla.configs import VerifyConfig
from care_mla.export.run import export_model
from care_mla.export.verify import verify
from care_mla.export_config import ExportConfig
from e2e.conftest import make_input

CASES: dict[str, dict[str, Any]] = {
    "decoupled": {"dtype": "bfloat16"},
    "exact-rope": {"form": "exact-rope"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_input(tmp_path_factory.mktemp("match"))


@pytest.mark.parametrize("name", CASES)
def test_matched_models_pass_their_check(name: str, folder: Path) -> None:
    output = folder / name
    body = convert(
        ConvertConfig(
            model=str(folder / "model"),
            output=output,
            work=folder / "work",  # calibrated once, for all
            calibration=str(folder / "calibration.txt"),
            calibration_tokens=1024,
            sequence_length=128,
            match_steps=20,
            match_tokens=4096,
            device="cpu",
            quiet=True,
            **CASES[name],
        )
    )
    assert body["verify"]["passed"], body["verify"]["problems"]
    assert list(body["stages"]) == ["check", "calibrate", "choose", "factor", "match", "export", "verify"]
    assert (body["match"]["steps"], body["match"]["tokens"]) == (20, 4096)
    assert body["match"]["kept"] is True
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
    if name == "decoupled":
        export_model(ExportConfig(model=output, output=folder / "again", profile="vllm", quiet=True))
        assert verify(VerifyConfig(model=folder / "again", quiet=True))["passed"]
