"""The command line as a shell sees it: exit codes, streams, recipes and JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from care_mla import __version__, console
from care_mla.cli.main import main
from care_mla.cli.options import parse
from care_mla.configs import CompareConfig, ConvertConfig, DemoConfig
from care_mla.errors import OptionError
from care_mla.evaluate_config import EvaluateConfig

from pico import pico_model

COMMAND = [
    sys.executable,
    "-c",
    "import sys; from care_mla.cli.main import main; sys.exit(main(sys.argv[1:]))",
]


@pytest.fixture(autouse=True)
def _talkative() -> Any:
    yield
    console.set_quiet(False)


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    """A folder with nothing but a config.json."""
    folder = tmp_path / "model"
    full = pico_model(tmp_path / "full", family="qwen2")
    folder.mkdir()
    (folder / "config.json").write_bytes((full / "config.json").read_bytes())
    return folder


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_inspect_needs_no_weights(
    config_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "result.json"
    assert main(["inspect", str(config_only), "--json", str(result)]) == 0
    out = capsys.readouterr().out
    assert "Qwen2ForCausalLM" in out
    body = json.loads(result.read_text())
    assert body["format"] == "care-mla/inspect/1"
    assert set(body["versions"]) == {"care_mla", "torch", "transformers", "python"}
    assert body["versions"]["care_mla"] == __version__
    assert body["seconds"] > 0
    assert body["supported"] is True
    assert body["cached_values"] == 64
    assert body["biases"] == ["q_bias", "k_bias", "v_bias"]
    half = [row for row in body["ranks"] if row["budget"] == 0.5]
    assert [(row["kv_lora_rank"], row["qk_rope_head_dim"]) for row in half] == [
        (16, 16),
        (24, 8),
        (28, 4),
        (30, 2),
    ]
    possible = {(p["profile"], p["engine"], p["options"]): p["possible"] for p in body["profiles"]}
    assert possible[("deepseek-v3", "transformers", "")]
    assert not possible[("deepseek-v3", "vLLM", "")]
    assert not possible[("vllm", "vLLM", "")]
    assert possible[("vllm", "vLLM", "--biases absorb")]


def test_inspect_names_what_blocks_and_exits_with_2(
    config_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(config_only, architectures=["Olmo3ForCausalLM"], model_type="olmo3")
    result = tmp_path / "result.json"
    assert main(["inspect", str(config_only), "--json", str(result)]) == 2
    captured = capsys.readouterr()
    assert "QK-norm" in captured.err
    assert captured.out == ""
    body = json.loads(result.read_text())
    assert body["supported"] is False
    assert "QK-norm" in body["blocked_by"]


def test_plan_writes_its_json_and_nothing_else(config_only: Path, tmp_path: Path) -> None:
    result = tmp_path / "deep" / "plan.json"
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["plan", str(config_only), "--budget", "0.25", "--json", str(result)]) == 0
    assert {path for path in tmp_path.rglob("*") if path.is_file()} - before == {result}
    body = json.loads(result.read_text())
    assert body["format"] == "care-mla/plan/1"
    assert body["cached_values"] == {"original": 64, "converted": 16}
    assert body["memory_bytes"] == sum(body["memory"].values())
    assert body["time_floor"] > 0
    assert any("fewer than" in w for w in body["warnings"]) is (body["calibration_tokens"] < 64)


def test_warnings_reach_the_json_once(
    config_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "plan.json"
    arguments = ["plan", str(config_only), "--calibration-tokens", "32", "--quiet", "--json", str(result)]
    for _ in range(2):
        assert main(arguments) == 0
    assert capsys.readouterr().err.count("fewer than hidden_size 64") == 2
    assert len(json.loads(result.read_text())["warnings"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["transform"], "no command 'transform'"),
        (["plan", "/no/such/folder"], "/no/such/folder"),
        (["plan", "demo", "--json", "."], "this is a folder"),
        (["plan", "demo", "--recipe", "missing.yaml"], "no such file"),
        (["evaluate", "demo", "--perplexity", "missing.txt"], "missing.txt"),
        (["verify", "missing"], "care convert MODEL missing"),
    ],
)
def test_users_mistakes_are_messages_on_stderr_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "demo", "--bugdet", "0.5"], "--budget"),
        (["plan", "demo", "--budget", "2"], "at most 1"),
        (["plan", "demo", "--budget", "half"], "half"),
        (["plan", "demo", "--form", "mla"], "decoupled"),
        (["plan", "demo", "--method", "svd"], "--form exact-rope"),
        (["plan"], "MODEL"),
        (["convert", "demo"], "OUTPUT"),
    ],
)
def test_wrong_options_exit_2_and_say_what_is_right(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.out + captured.err).replace("│", " ").split())
    assert captured.out == ""


def test_existing_output_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "out" / "kept.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    assert main(["convert", "demo", str(kept.parent)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert kept.read_text() == "mine"


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "convert" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"care {__version__}\n"


def test_flags_win_over_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: demo\noutput: a\nbudget: 0.25\nseed: 3\nwork: null\ntrust-remote-code: false\nquiet: true\n"
    )
    config = parse(ConvertConfig, "convert", ["--recipe", str(recipe), "--seed", "5"])
    assert (config.model, config.output, config.budget, config.seed) == ("demo", Path("a"), 0.25, 5)
    assert config.quiet
    assert config.work is None
    other = parse(ConvertConfig, "convert", ["gpt", "b", f"--recipe={recipe}", "--budget", "1.0"])
    assert (other.model, other.output, other.budget, other.seed) == ("gpt", Path("b"), 1.0, 3)


def test_mistakes_in_a_recipe_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("bugdet: 0.25\n")
    with pytest.raises(OptionError, match=r"'bugdet'.*Perhaps you meant 'budget'"):
        parse(ConvertConfig, "convert", ["demo", "out", "--recipe", str(recipe)])
    recipe.write_text("sequence_length: many\n")
    with pytest.raises(SystemExit):
        parse(ConvertConfig, "convert", ["demo", "out", "--recipe", str(recipe)])
    assert "many" in capsys.readouterr().err


def test_arguments_and_repeated_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The default folder may be there already where the tests are run.
    monkeypatch.chdir(tmp_path)
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for text in texts:
        text.write_text("text")
    words = ["--perplexity", str(texts[0]), "demo", "out", "--perplexity", str(texts[1])]
    config = parse(EvaluateConfig, "evaluate", words)
    assert config.models == ("demo", "out")
    assert config.perplexity == tuple(texts)
    assert parse(EvaluateConfig, "evaluate", ["demo"]).perplexity == ()
    assert parse(DemoConfig, "demo", []).folder == Path("care-demo")
    assert parse(DemoConfig, "demo", [str(tmp_path)]).folder == tmp_path
    compare = parse(CompareConfig, "compare", ["demo", "--methods", "svd,care-u"])
    assert [method for method, _ in compare.method_forms()] == ["svd", "care-u", "care-u"]
    (tmp_path / "model").mkdir()
    with pytest.raises(OptionError, match="--overwrite"):
        parse(DemoConfig, "demo", [str(tmp_path)])


def test_interrupt_exits_with_130_and_says_that_work_is_kept(config_only: Path) -> None:
    # Reading this configuration blocks until somebody writes to it, so the signal meets a working command.
    (config_only / "config.json").unlink()
    os.mkfifo(config_only / "config.json")
    process = subprocess.Popen(
        [*COMMAND, "inspect", str(config_only)],
        stderr=subprocess.PIPE,
        text=True,
        # Background jobs of a shell ignore the signal, and hand that on to their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    writer = os.open(config_only / "config.json", os.O_WRONLY)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    os.close(writer)
    assert process.returncode == 130
    assert "work kept" in err
    assert "Traceback" not in err


def test_our_own_fault_keeps_its_traceback_and_exits_with_1() -> None:
    code = "from care_mla.cli import main as m; m.COMMANDS['broken'] = ''; m.main(['broken'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_reader_that_leaves_is_no_error(config_only: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [*COMMAND, "inspect", str(config_only)], stdout=write_end, stderr=subprocess.PIPE, check=False
    )
    os.close(write_end)
    assert done.returncode == 0
    assert done.stderr == b""


def test_plain_progress_is_a_line_per_item_and_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = console.Console()
    with terminal.progress("layers", 3) as progress:
        for layer_idx in range(3):
            progress.advance(text=f"layer {layer_idx}")
    with terminal.progress("tokens", 10_000) as progress:
        for _ in range(10_000):
            progress.advance()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [
        ["layers", "1/3"],
        ["layers", "2/3"],
        ["layers", "3/3"],
    ]
    assert lines[2].endswith("layer 2")
    assert 30 < len(lines[3:]) <= 41
    assert lines[-1].startswith("tokens 10000/10000")
    quiet = console.Console(quiet=True)
    quiet.step("step")
    quiet.note("note")
    with quiet.progress("layers", 1) as progress:
        progress.advance()
    assert capsys.readouterr().err == ""
    quiet.warn("twice")
    quiet.warn("twice")
    assert capsys.readouterr().err == "Warning: twice\n"
    assert quiet.warnings == ["twice"]


def test_tables_align_numbers_and_keep_every_cell(capsys: pytest.CaptureFixture[str]) -> None:
    console.Console().table("Title", ["name", "n"], [["a", 1234567], ["b [x]", None], ["c", 0.123456]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "Title"
    assert lines[4:] == ["a      1,234,567", "b [x]          -", "c         0.1235"]
