"""What `make bench-paper` runs are commands that exist, each after those whose results it reads."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from care_mla.cli.options import parse
from care_mla.configs import CompareConfig, ConvertConfig
from care_mla.evaluate_config import EvaluateConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def paper() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper", ROOT / "benchmarks" / "paper.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["paper"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def texts(paper: ModuleType, tmp_path: Path) -> object:
    files = [tmp_path / name for name in ("wiki.test.raw", "alpaca.json", "wiki.valid.txt", "questions.json")]
    for path in files:
        path.write_text("")
    return paper.Texts(*files[:3], (files[3],))


def test_every_run_parses_and_finds_what_it_reads(paper: ModuleType, texts: object, tmp_path: Path) -> None:
    output = tmp_path / "bench-paper"
    seen: dict[str, tuple[str, ...]] = {}
    for run in paper.runs(texts, output):
        assert seen.get(run.target, run.words) == run.words
        assert run.folder in paper.FOLDERS
        command, *words = run.words[1:] if run.words[0] == "care" else ("mix", *run.words[2:])
        match command:
            case "compare":
                config = parse(CompareConfig, "compare", words)
                assert config.json == output / run.target
                assert config.calibration_tokens is not None
                assert config.sequence_length is not None
                assert config.work is not None
            case "convert":
                assert parse(ConvertConfig, "convert", words).output == output / run.target
            case "evaluate":
                models = parse(EvaluateConfig, "evaluate", words).models
                assert {Path(model).relative_to(output).as_posix() for model in models[1:]} <= set(seen)
            case _:
                assert Path(run.words[1]).is_file()
                # As if it had been run: the next one reads it.
                (output / run.target).parent.mkdir(parents=True, exist_ok=True)
                (output / run.target).write_text("")
        seen[run.target] = run.words


def test_every_result_here_is_of_a_run(paper: ModuleType, texts: object, tmp_path: Path) -> None:
    targets = {run.target for run in paper.runs(texts, tmp_path)}
    for folder in set(paper.FOLDERS) - {"one-shot"}:
        for path in (ROOT / "benchmarks" / folder).glob("*.json"):
            assert f"{folder}/{path.name}" in targets
            assert json.loads(path.read_text())["format"].startswith("care-mla/")


def test_list_prints_and_runs_nothing(tmp_path: Path) -> None:
    words = ["--perplexity", "a", "--alpaca", "b", "--wikitext", "c", "--list", "--only", "allocation"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "paper.py"), *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("care compare demo") == 8
    assert not list(tmp_path.iterdir())


def test_make_names_the_text_that_is_missing() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "bench-paper", "PERPLEXITY=nowhere.raw"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "PERPLEXITY=nowhere.raw: there is no such file" in done.stdout


def test_mixtures_have_equal_parts(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "aa " * 2000}, {"text": "aa " * 2000}]))
    (tmp_path / "b.txt").write_text("bb " * 1000)
    words = ["a.json", "b.txt", "--output", "mixed.txt"]
    mix = str(ROOT / "benchmarks" / "calibration" / "mix.py")
    subprocess.run([sys.executable, mix, *words], cwd=tmp_path, check=True)
    mixed = (tmp_path / "mixed.txt").read_text().split()
    assert mixed.count("bb") == 1000
    assert mixed.count("aa") == pytest.approx(1000, rel=0.05)
