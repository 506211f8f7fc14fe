"""Stock checkpoints against the rules that docs/engines.md writes down for an engine that is not run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from care_mla.export.vllm import write_vllm_checkpoint
from care_mla.profiles import profile_blocker
from care_mla.serving import kernels
from care_mla.workspace import read_json
from export_cases import export

DOCS = Path(__file__).parents[2] / "docs" / "engines.md"


def table(heading: str) -> list[list[str]]:
    """Rows of the table in one section, without its head."""
    section = DOCS.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def breaches(config: dict[str, Any]) -> list[str]:
    """Rules of SGLang's table that a configuration breaks."""
    found = []
    for keys, value, _ in table("SGLang"):
        for key in codes(keys):
            if key not in config:
                found.append(f"{key} is missing")
                continue
            match key, value:
                case "rope_parameters", _:
                    rope = config[key]
                    if rope["rope_type"] != "default" or not rope["rope_theta"] > 1:
                        found.append(f"{key} {rope}")
                case _, "integers":
                    if type(config[key]) is not int:
                        found.append(f"{key} {config[key]!r} is no integer")
                case _, "`num_hidden_layers`":
                    if config[key] != config["num_hidden_layers"]:
                        found.append(f"{key} {config[key]}")
                case _, "as written":
                    pass
                case _, _:
                    (expected,) = codes(value)
                    if json.dumps(config[key]).strip('"') != expected:
                        found.append(f"{key} {config[key]!r}, expected {expected}")
    return found


@pytest.mark.parametrize("options", [{}, {"tied": False}, {"family": "mistral", "head_dim": 32}])
def test_stock_checkpoints_keep_sglangs_rules(options: dict[str, Any], tmp_path) -> None:
    exported = export(tmp_path, tokenizer=False, **options)
    assert breaches(read_json(exported.folder / "config.json")) == []
    write_vllm_checkpoint(exported.source, exported.layers.__getitem__, tmp_path / "vllm", torch.float32)
    assert breaches(read_json(tmp_path / "vllm" / "config.json")) == []
    assert profile_blocker(exported.source.facts, "deepseek-v3", engine="SGLang") is None


@pytest.mark.parametrize(
    ("options", "broken"),
    [
        ({"family": "qwen2"}, ["q_lora_rank", "attention_bias"]),
        ({"rope": "llama3"}, ["rope_parameters"]),
    ],
)
def test_what_sglang_would_misread_breaks_a_rule_and_is_blocked(options, broken, tmp_path) -> None:
    exported = export(tmp_path, tokenizer=False, **options)
    found = breaches(read_json(exported.folder / "config.json"))
    assert [breach.split()[0] for breach in found] == broken
    assert profile_blocker(exported.source.facts, "deepseek-v3", engine="SGLang") is not None


def test_every_kernel_of_the_table_is_in_the_docs() -> None:
    named = {name for row in table("vLLM") for name in re.findall(r"\b[A-Z]+_[A-Z_]+\b|FLASHMLA", row[0])}
    assert named == {kernel.name for kernel in kernels(512, 64, 128, 128)}
