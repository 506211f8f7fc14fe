"""`verify --engine vllm` without vLLM: what stands in the way is named. With it: tests/engines."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from care_mla.cli.main import main
from care_mla.errors import CareError
from care_mla.export import engine_transformers, engine_vllm
from care_mla.export.verify import read_reference
from care_mla.export.vllm_process import PYTHON_VARIABLE, misread, run_vllm
from care_mla.workspace import read_json
from export_cases import export

# The Python that virtual environments are made from, which holds none of their packages.
BARE_PYTHON = sys._base_executable  # type: ignore[attr-defined]


def test_both_engine_scripts_read_the_same_reference() -> None:
    assert engine_vllm.REFERENCE == engine_transformers.REFERENCE
    assert engine_vllm.METADATA_KEY == engine_transformers.METADATA_KEY


@pytest.mark.parametrize(
    ("python", "reason"), [(BARE_PYTHON, "has no vLLM"), ("/nowhere/python", "cannot be run")]
)
def test_absent_vllm_exits_with_2_and_says_what_to_type(
    python: str, reason: str, tmp_path, monkeypatch, capsys
) -> None:
    folder = export(tmp_path, tokenizer=False).folder
    monkeypatch.setenv(PYTHON_VARIABLE, python)
    monkeypatch.setenv("COLUMNS", "400")
    capsys.readouterr()
    assert main(["verify", str(folder), "--engine", "vllm"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert reason in message
    assert "Install vLLM 0.32 or later" in message
    assert f"{PYTHON_VARIABLE}=ENVIRONMENT/bin/python care verify {folder} --engine vllm" in message


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("0.9.2", "vLLM 0.9.2 is older than 0.32"),
        ("0.31.1", "older than"),
        ("0.32.0", None),
        ("0.33.0+cu130", None),
        ("1.0", None),
    ],
)
def test_old_versions_are_named(version: str, problem: str | None, tmp_path, monkeypatch) -> None:
    (tmp_path / "vllm.py").write_text(f"__version__ = {version!r}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    found = engine_vllm.engine_problem()
    monkeypatch.delitem(sys.modules, "vllm")
    assert found == problem if problem is None else problem in str(found)


def test_models_that_vllm_cannot_run(tmp_path) -> None:
    folder = export(tmp_path, tokenizer=False).folder
    stored = read_reference(folder)
    with pytest.raises(CareError, match=r"profile care.*--engine transformers"):
        run_vllm(folder, replace(stored, runs_code=True))
    with pytest.raises(CareError, match=r"first layers alone.*--engine transformers"):
        run_vllm(folder, replace(stored, is_slice=True))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tied": False}, None),
        ({}, "does not tie the head"),
        ({"family": "qwen2", "tied": False}, "drops attention biases"),
        ({"rope": "llama3", "tied": False}, "takes rope_type llama3 for YaRN"),
    ],
)
def test_which_models_need_transformers_class_in_vllm(options, reason: str | None, tmp_path) -> None:
    found = misread(read_json(export(tmp_path, tokenizer=False, **options).folder / "config.json"))
    assert found == reason if reason is None else reason in str(found)
