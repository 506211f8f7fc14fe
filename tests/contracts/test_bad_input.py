"""What the user can get wrong: exit code 2, one message that names it, no traceback, nothing written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from care_mla.cli.main import main

from pico import pico_gguf, pico_model, pico_text

CARE = str(Path(sys.executable).with_name("care"))
FAST = ["--calibration-tokens", "1024", "--sequence-length", "128", "--device", "cpu"]
CONVERT = ["convert", "model", "OUT", "--calibration", "text.txt", *FAST]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a sound `model` and a sound `text.txt`, which is where the command runs."""
    pico_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(pico_text(3000))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")  # a wrapped message could not be searched
    return tmp_path


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def run(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as stopped:  # of the parser
        return int(str(stopped.code))


def refused(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run a command that must be refused, and return its message."""
    before = contents(folder)
    capsys.readouterr()
    code = run(arguments)
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert contents(folder) == before, "something was written"
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return " ".join(captured.err.replace("│", " ").split())


def sharded(folder: Path) -> None:
    for path in (folder / "model").glob("*.safetensors"):
        path.unlink()
    pico_model(folder / "model", shards=3)


def missing_shard(folder: Path) -> None:
    sharded(folder)
    next((folder / "model").glob("model-00002-*")).unlink()


def truncated(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def corrupt(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def with_value(value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        weights = load_file(path)
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        save_file(weights, path, metadata={"format": "pt"})

    return change


def with_config(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def no_config(folder: Path) -> None:
    (folder / "model" / "config.json").unlink()


def no_tokenizer(folder: Path) -> None:
    for path in (folder / "model").glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (missing_shard, "model-00002-of-"),
        (truncated, "model.safetensors"),
        (corrupt, "model.safetensors"),
        (with_value(torch.nan), "model.layers.1.mlp.up_proj.weight holds 1 NaN"),
        (with_value(torch.inf), "model.layers.1.mlp.up_proj.weight holds 1 Inf"),
        (with_config(architectures=["MambaForCausalLM"], model_type="mamba"), "Mamba"),
        (with_config(auto_map={"AutoModelForCausalLM": "own.Model"}), "own.Model"),
        (with_config(num_hidden_layers=3), "model.layers.2."),
        (no_config, "config.json"),
        (no_tokenizer, "tokenizer"),
    ],
    ids=[
        *("missing-shard", "truncated", "corrupt", "nan", "inf", "architecture", "remote-code", "layers"),
        *("no-config", "no-tokenizer"),
    ],
)
@pytest.mark.parametrize("command", ["convert", "compare"])
def test_models(
    change: Callable[[Path], None],
    named: str,
    command: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(folder)
    arguments = CONVERT if command == "convert" else ["compare", "model", *CONVERT[3:]]
    message = refused(folder, capsys, arguments)
    assert named in message
    assert message.count(f"care {command}:") == 1


def test_a_model_that_cannot_be_reached(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(folder, capsys, ["convert", "nobody/no-such-model", *CONVERT[2:]])
    assert "nobody/no-such-model" in message
    assert "HF_HUB_OFFLINE" in message


def test_gguf_of_another_architecture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pico_gguf(folder / "model")
    # The key's length and the type of its value come between the key and the word.
    data = path.read_bytes()
    assert b"general.architecture" in data
    place = data.index(b"llama", data.index(b"general.architecture"))
    path.write_bytes(data[:place] + b"gemma" + data[place + 5 :])
    assert "gemma" in refused(folder, capsys, ["convert", "model.gguf", *CONVERT[2:]])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--budget", "0"], "--budget 0"),
        (["--budget", "1.5"], "--budget 1.5"),
        (["--budget", "-1"], "--budget -1"),
        (["--budget", "half"], "half"),
        (["--budget", "nan"], "--budget nan"),
        (["--budget", "0.01"], "--budget 0.01"),
        (["--kv-lora-rank", "65", "--qk-rope-head-dim", "8"], "--kv-lora-rank 65 is above the full rank 64"),
        (["--kv-lora-rank", "60", "--qk-rope-head-dim", "8"], "--kv-lora-rank 56"),
        (["--kv-lora-rank", "0", "--qk-rope-head-dim", "8"], "--kv-lora-rank 0"),
        (["--kv-lora-rank", "16"], "--qk-rope-head-dim"),
        (["--kv-lora-rank", "65", "--form", "exact-rope", "--method", "joint"], "above the full rank 64"),
        (["--kv-lora-rank", "15", "--form", "exact-rope", "--method", "svd"], "--kv-lora-rank 15 is odd"),
        (["--qk-rope-head-dim", "7"], "--qk-rope-head-dim 7 is odd"),
        (["--qk-rope-head-dim", "32"], "--qk-rope-head-dim 32"),
        (["--budget", "0.5", "--kv-lora-rank", "8"], "--kv-lora-rank 8"),
        (["--method", "magic"], "'magic'"),
        (["--method", "palu"], "--form exact-rope"),
        (["--form", "exact"], "exact"),
        (["--allocation", "fair"], "fair"),
        (["--allocation", "greedy", "--profile", "deepseek-v3"], "greedy"),
        (["--form", "exact-rope", "--profile", "deepseek-v3"], "--form exact-rope"),
        (["--profile", "gguf"], "gguf"),
        (["--dtype", "float16"], "float16"),
        (["--device", "tpu"], "'tpu'"),
        (["--damping", "-1"], "--damping -1"),
        (["--seed", "-1"], "--seed -1"),
        (["--max-spool-gib", "0"], "--max-spool-gib 0"),
        (["--sequence-length", "2048"], "--sequence-length 2048"),
        (["--calibration", "missing.txt"], "missing.txt"),
        (["--calibration", "text.pdf"], "text.pdf"),
    ],
    ids=" ".join,
)
def test_options(options: list[str], named: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "text.pdf").write_text("not text")
    assert named in refused(folder, capsys, CONVERT + options)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ("Only a few words.", "--calibration text.txt has"),
        (pico_text(200), "1,024"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
    ids=["empty", "blank", "few", "less", "bytes"],
)
@pytest.mark.parametrize("command", ["convert", "compare"])
def test_calibration_text(
    text: str | bytes, named: str, command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "text.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    arguments = CONVERT if command == "convert" else ["compare", "model", *CONVERT[3:]]
    assert named in refused(folder, capsys, arguments)


def test_a_refused_text_does_not_spoil_the_work_folder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "text.txt").write_text("Only a few words.")
    (folder / "work").mkdir()
    refused(folder, capsys, [*CONVERT, "--work", "work"])
    (folder / "text.txt").write_text(pico_text(3000))
    assert run([*CONVERT, "--work", "work", "--quiet"]) == 0


def test_an_output_that_exists(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "OUT").mkdir()
    (folder / "OUT" / "mine.txt").write_text("kept")
    assert "--overwrite" in refused(folder, capsys, CONVERT)


def test_overwrite_never_deletes_what_is_no_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "OUT").mkdir()
    (folder / "OUT" / "mine.txt").write_text("kept")
    assert "no config.json" in refused(folder, capsys, [*CONVERT, "--overwrite"])


def test_the_source_is_never_the_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", "model", "./model", *CONVERT[3:], "--overwrite"]
    assert "model" in refused(folder, capsys, arguments)


def test_a_disk_that_is_too_small(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Layer inputs of so many tokens take 768 TB.
    options = ["--calibration-tokens", str(10**12), "--max-spool-gib", "1e9"]
    message = refused(folder, capsys, CONVERT + options)
    assert "GiB are needed" in message
    assert "--work" in message


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["verify", "model"], "model"),
        (["verify", "nowhere"], "nowhere"),
        (["verify", "model", "--engine", "llama.cpp"], "care export model model.gguf"),
        (["export", "model", "OUT"], "source_config.json is missing"),
        (["export", "model", "x.gguf"], "source_config.json is missing"),
        (["export", "nowhere", "x.gguf"], "nowhere"),
        (["export", "model", "text.txt"], "text.txt exists already"),
        (["export", "model", "OUT", "--quantization", "f16"], "Choose f32 or bf16"),
        (["export", "model", "OUT", "--profile", "gguf"], "Name it OUT.gguf"),
        (["export", "model", "OUT", "--profile", "onnx"], "onnx"),
        (["evaluate", "model", "--perplexity", "nowhere.txt"], "nowhere.txt"),
        (["evaluate", "model", "--perplexity", "text.txt", "--block", "1000000"], "--block"),
        (["evaluate"], "MODEL"),
        (["compare", "model", "--methods", "svd,magic"], "'magic'"),
        (["compare", "model", "--methods", "svd", "--form", "decoupled"], "--form exact-rope"),
        (["compare", "model", "--methods", ","], "--methods"),
        (["inspect", "nowhere/at/all"], "nowhere/at/all"),
        (["plan", "model", "--budget", "2"], "--budget 2"),
        (["bench", "heat", "model"], "heat"),
        (["bench", "decode"], "care bench decode demo"),
        (["bench", "decode", "nowhere"], "nowhere"),
        (["bench", "decode", "model", "--context", "long"], "--context 256,1024"),
        (["bench", "decode", "model", "--context", "1000000"], "max_position_embeddings"),
        (["bench", "memory", "model", "--new-tokens", "3"], "--new-tokens 3"),
        (["bench", "convert", "model", "model"], "one MODEL"),
        (["bench", "convert", "model", "--conversion", "nowhere.yaml"], "nowhere.yaml"),
        (["bench", "convert", "model", "--scratch", "nowhere"], "nowhere"),
        (["bake", "model"], "'bake'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_other_commands(
    arguments: list[str], named: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in refused(folder, capsys, arguments)


def test_a_shell_sees_the_same(folder: Path) -> None:
    truncated(folder)
    before = contents(folder)
    done = subprocess.run([CARE, *CONVERT], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("care convert: ")
    assert "Traceback" not in done.stderr
    assert contents(folder) == before
