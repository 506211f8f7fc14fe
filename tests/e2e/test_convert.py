"""Convert, load, verify and evaluate a small model, as a user types it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from e2e.command import ENVIRONMENT, FAST, care, hashes, modified
from e2e.conftest import Conversion

from pico import pico_model

HEAD = {"format", "versions", "seconds", "warnings"}
VERDICT = {
    *("engine", "class", "relative_error", "max_abs_logprob_difference", "greedy_equal", "cached_values"),
    *("kl_to_original", "layers_compared", "passed", "problems"),
}
CALIBRATED = ("rotation", "statistics")
WITHOUT_CARE = """
import sys
sys.modules["care_mla"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
tokens = AutoTokenizer.from_pretrained(sys.argv[1])("The old river", return_tensors="pt")
answer = model.generate(**tokens, max_new_tokens=8, do_sample=False)
print(type(model).__name__, answer.shape[1] - tokens["input_ids"].shape[1])
"""


def test_result_of_a_conversion(converted: Conversion) -> None:
    assert converted.done.code == 0, converted.done.err
    body = converted.done.json
    assert set(body) == HEAD | {
        *("cached_values", "kv_lora_rank", "qk_rope_head_dim", "freqfold", "form", "method", "allocation"),
        *("profile", "held_out_kl", "needs_healing", "output", "stages", "peak_memory_bytes", "export"),
        *("layers", "verify", "rope", "biases", "engines", "model", "recipe", "fingerprints"),
        "candidates",
    }
    assert body["format"] == "care-mla/convert/1"
    assert body["cached_values"] == {"original": 64, "converted": 32}
    assert body["kv_lora_rank"] + body["qk_rope_head_dim"] == 32
    assert (body["form"], body["method"], body["profile"]) == ("decoupled", "fisher", "deepseek-v3")
    assert body["output"] == "OUT"
    assert list(body["stages"]) == ["check", "calibrate", "choose", "factor", "export", "verify"]
    assert 0 < sum(body["stages"].values()) <= body["seconds"]
    assert body["peak_memory_bytes"] > 100 * 2**20  # torch alone takes more
    assert set(body["verify"]) == VERDICT
    assert body["verify"]["passed"] is True
    assert body["held_out_kl"] > 0
    assert body["needs_healing"] == []
    assert body["model"] == "model"
    assert body["recipe"] == (converted.output / "recipe.yaml").read_text()
    (chosen,) = [row for row in body["candidates"] if row["chosen"]]
    assert chosen["kl"] == body["held_out_kl"] == min(row["kl"] for row in body["candidates"])
    assert list(body["fingerprints"]) == ["source weights", "calibration tokens"]


def test_layers_of_a_conversion(converted: Conversion) -> None:
    rows = converted.done.json["layers"]
    assert len(rows) == 3
    for row in rows:
        names = {"rank", "ranks", "cached_values", "predicted_error", "spectrum", "gamma", "rope_kept"}
        assert set(row) == names
        assert row["rank"] == converted.done.json["kv_lora_rank"]
        assert 0 < row["predicted_error"] < 1
        assert row["spectrum"] == sorted(row["spectrum"], reverse=True)
        assert len(row["gamma"]) == 8  # one for each frequency
        assert all(0 <= value <= 1 for value in row["gamma"])
        assert len(row["rope_kept"]) == 4  # one for each query head
        assert all(value <= 1 for value in row["rope_kept"])


def test_own_text_needs_no_file(converted: Conversion, tmp_path: Path) -> None:
    shutil.copytree(converted.folder / "model", tmp_path / "model")
    done = care(tmp_path, "convert", "model", "OUT", "--calibration", "self", *FAST)
    assert done.code == 0, done.err
    assert done.json["verify"]["passed"] is True
    assert hashes(tmp_path / "OUT")["model.safetensors"] != hashes(converted.output)["model.safetensors"]


def test_plain_transformers_loads_it(converted: Conversion) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_CARE, str(converted.output)],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["DeepseekV3ForCausalLM", "8"]


def test_output_is_an_ordinary_folder(converted: Conversion) -> None:
    names = {path.name for path in converted.output.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml", "README.md"} <= names
    assert not [name for name in names if name.endswith((".tmp", ".py"))]
    # Each test's own --json aside.
    assert {path.name for path in converted.folder.iterdir()} - {"result.json"} == {
        *("model", "calibration.txt", "text.txt", "OUT", "OUT.work")
    }


def test_verify_passes_what_was_written(converted: Conversion) -> None:
    done = care(converted.folder, "verify", "OUT")
    assert done.code == 0, done.err
    assert set(done.json) == HEAD | VERDICT
    assert done.json["format"] == "care-mla/verify/1"
    assert done.json["class"] == "DeepseekV3ForCausalLM"
    assert done.json["relative_error"] < 1e-5
    assert done.json["greedy_equal"] is True
    assert done.json["cached_values"] == 32
    assert done.json["kl_to_original"] == pytest.approx(converted.done.json["verify"]["kl_to_original"])


def test_verify_fails_one_changed_tensor(converted: Conversion, tmp_path: Path) -> None:
    shutil.copytree(converted.output, tmp_path / "OUT")
    path = tmp_path / "OUT" / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    weights[name] = weights[name] + 0.02 * weights[name].std() * torch.randn_like(weights[name])
    save_file(weights, path, metadata={"format": "pt"})
    done = care(tmp_path, "verify", "OUT")
    assert done.code == 3, done.err
    assert done.json["passed"] is False
    assert "relative error" in done.json["problems"][0]


def test_evaluate_original_and_converted(converted: Conversion) -> None:
    done = care(converted.folder, "evaluate", "model", "OUT", "--perplexity", "text.txt", "--block", "256")
    assert done.code == 0, done.err
    assert set(done.json) == HEAD | {"models", "limit", "seed"}
    original, converted_row = done.json["models"]
    for row, model, values in ((original, "model", 64), (converted_row, "OUT", 32)):
        assert {"model", "cached_values", "cache_bytes_per_token", "perplexity"} <= set(row)
        assert (row["model"], row["cached_values"]) == (model, values)
        assert row["cache_bytes_per_token"] == 3 * 4 * values  # three layers in float32
        found = row["perplexity"]["text"]
        assert found["block"] == 256
        assert found["tokens"] % 255 == 0
        assert 1 < found["value"] < 1e6
    assert "kl" not in original["perplexity"]["text"]
    assert converted_row["perplexity"]["text"]["kl"] > 0
    assert math.log(converted_row["perplexity"]["text"]["value"]) > 0


@pytest.mark.parametrize(
    "options",
    [("--budget", "0.25"), ("--form", "exact-rope", "--method", "svd-llm")],
    ids=["budget", "method"],
)
def test_other_budgets_and_methods_keep_the_calibration(
    converted: Conversion, tmp_path: Path, options: tuple[str, ...]
) -> None:
    before = {name: (hashes(converted.work / name), modified(converted.work / name)) for name in CALIBRATED}
    tokens = (converted.work / "tokens.safetensors").stat().st_mtime_ns
    done = care(
        converted.folder, "convert", "model", tmp_path / "OUT", "--calibration", "calibration.txt",
        "--work", "OUT.work", *FAST, *options,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert before == {
        name: (hashes(converted.work / name), modified(converted.work / name)) for name in CALIBRATED
    }
    assert (converted.work / "tokens.safetensors").stat().st_mtime_ns == tokens


def test_another_seed_is_refused_by_name(converted: Conversion, tmp_path: Path) -> None:
    before = hashes(converted.work)
    done = care(
        converted.folder, "convert", "model", tmp_path / "OUT", "--calibration", "calibration.txt",
        "--work", "OUT.work", *FAST, "--seed", "1",
    )  # fmt: skip
    assert done.code == 2
    assert "seed was 0, now 1" in done.err
    assert "--work" in done.err
    assert not (tmp_path / "OUT").exists()
    assert hashes(converted.work) == before


def test_another_damping_chooses_anew(converted: Conversion, tmp_path: Path) -> None:
    measured = set(converted.work.glob("choice_*.json"))
    done = care(
        converted.folder, "convert", "model", tmp_path / "OUT", "--calibration", "calibration.txt",
        "--work", "OUT.work", *FAST, "--damping", "3",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["held_out_kl"] != converted.done.json["held_out_kl"]
    assert len(set(converted.work.glob("choice_*.json")) - measured) == 1


def test_the_recipe_gives_the_same_weights(converted: Conversion) -> None:
    done = care(converted.folder, "convert", "model", "AGAIN", "--recipe", "OUT/recipe.yaml")
    assert done.code == 0, done.err
    expected, found = hashes(converted.output), hashes(converted.folder / "AGAIN")
    for folder in ("AGAIN", "AGAIN.work"):
        shutil.rmtree(converted.folder / folder)
    differing = {name for name in expected if expected[name] != found[name]}
    # They name their folder.
    assert differing <= {"README.md", "recipe.yaml", "care_reference/card.json"}
    assert set(expected) == set(found)


def test_a_float16_original_is_written_in_bfloat16(tmp_path: Path, converted: Conversion) -> None:
    pico_model(tmp_path / "model", dtype=torch.float16)
    shutil.copy(converted.folder / "calibration.txt", tmp_path)
    done = care(tmp_path, "convert", "model", "OUT", "--calibration", "calibration.txt", *FAST)
    assert done.code == 0, done.err
    assert "the original is float16" in done.err
    assert any("float16" in warning for warning in done.json["warnings"])
    assert json.loads((tmp_path / "OUT" / "config.json").read_text())["dtype"] == "bfloat16"
