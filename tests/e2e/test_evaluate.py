"""`care evaluate` and `care generate`: what they measure, write and print, and what they refuse."""

from __future__ import annotations

import json
import math
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from care_mla import console
from care_mla.cli.main import main
from care_mla.evaluate.side_by_side import parting
from export_cases import export

from pico import pico_model, pico_text

SKY = {"question": "What is the sky?", "choices": ["red", "blue"], "answer": "B"}
TABLES = ("perplexity", "KL(original || model)", "acc_norm", "passkey", "tokens per second")


class Evaluated(NamedTuple):
    """A folder with `source`, `out` (converted), `other` (another tokenizer), and an evaluation of all."""

    folder: Path
    body: dict[str, Any]
    out: str


@pytest.fixture(autouse=True)
def _talkative() -> Any:
    yield
    console.set_quiet(False)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    folder = tmp_path_factory.mktemp("evaluated")
    export(folder)
    pico_model(folder / "other", vocab=300, seed=3)
    (folder / "text.txt").write_text(pico_text(500))
    (folder / "sky.json").write_text(json.dumps([SKY, SKY | {"answer": "A"}] * 3))
    words = ["evaluate", *(str(folder / name) for name in ("source", "out", "other"))]
    words += ["--perplexity", str(folder / "text.txt"), "--block", "64", "--max-tokens", "300"]
    words += ["--tasks", str(folder / "sky.json"), "--limit", "4", "--passkey", "--needle-lengths", "320"]
    words += ["--needle-seeds", "1", "--device", "cpu", "--quiet", "--json", str(folder / "result.json")]
    with redirect_stdout(StringIO()) as out:
        assert main(words) == 0
    return Evaluated(folder, json.loads((folder / "result.json").read_text()), out.getvalue())


def test_the_json_holds_what_the_contract_names(evaluated: Evaluated) -> None:
    body = evaluated.body
    assert body["format"] == "care-mla/evaluate/1"
    source, out, _ = body["models"]
    assert [Path(row["model"]).name for row in body["models"]] == ["source", "out", "other"]
    assert (source["cached_values"], source["cache_bytes_per_token"]) == (64, 512)
    assert out["cached_values"] < 64
    text = source["perplexity"]["text"]
    assert (text["tokens"], text["block"], text["blocks"]) == (4 * 63, 64, 4)
    assert text["word_level"]["tokens"] == 300
    assert text["word_level"]["window"] == 1024
    assert source["tasks"]["sky"]["items"] == 4
    assert out["passkey"]["lengths"] == [320]
    assert out["needle"] is None
    assert source["speed"]["decode_tokens_per_second"] > 0


def test_the_original_stands_alone_and_others_are_compared_with_it(evaluated: Evaluated) -> None:
    source, out, other = evaluated.body["models"]
    before, after = source["perplexity"]["text"], out["perplexity"]["text"]
    assert "kl" not in before
    assert "difference" not in source["tasks"]["sky"]
    assert after["kl"] > 0
    assert after["difference"]["nll"] == pytest.approx(after["nll"] - before["nll"], abs=1e-9)
    assert after["difference"]["perplexity_ratio"] == pytest.approx(after["value"] / before["value"])
    change = out["tasks"]["sky"]["difference"]["acc"]["value"]
    assert change == pytest.approx(out["tasks"]["sky"]["acc"] - source["tasks"]["sky"]["acc"])
    assert out["passkey"]["difference"] == {"value": 0, "stderr": 0}
    # Another tokenizer's ids cannot be compared token by token; its words and its answers can.
    assert "kl" not in other["perplexity"]["text"]
    assert "difference" not in other["perplexity"]["text"]
    assert "difference" not in other["passkey"]
    assert "difference" in other["tasks"]["sky"]
    assert other["perplexity"]["text"]["word_level"]["words"] == before["word_level"]["words"]


def test_perplexity_is_plain_transformers(evaluated: Evaluated) -> None:
    tokenizer = AutoTokenizer.from_pretrained(evaluated.folder / "out")
    model = AutoModelForCausalLM.from_pretrained(evaluated.folder / "out", dtype=torch.float32)
    text = (evaluated.folder / "text.txt").read_text()
    tokens_BL = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:256]).view(4, 64)
    losses = [model(row_1L, labels=row_1L).loss.item() for row_1L in tokens_BL.split(1)]
    found = evaluated.body["models"][1]["perplexity"]["text"]["value"]
    assert found == pytest.approx(math.exp(sum(losses) / 4), rel=1e-4)


def test_one_table_shows_it_all(evaluated: Evaluated) -> None:
    for word in TABLES:
        assert word in evaluated.out
    assert evaluated.out.count("Evaluated") == 1


@pytest.fixture
def folder(evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(evaluated.folder)
    return evaluated.folder


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--perplexity", "text.txt", "--block", "2000"], "text.txt: "),
        (["--tasks", "none.json"], "--tasks none.json"),
        (["--tasks", "half.json"], "half.json: record 2 has no answer"),
        (["--tasks", "one.json"], "one.json: record 1: choice 2 of 2 is missing"),
        (["--tasks", "sky.json,sub/sky.json"], "same name"),
        (["--limit", "5"], "--limit 5 has no effect"),
        (["--haystack", "text.txt"], "--haystack text.txt has no effect"),
        (["--needle-lengths", "512"], "--needle-lengths 512 has no effect"),
        (["--needle", "--needle-lengths", "long"], "'long'"),
        (["--needle", "--needle-lengths", "4096"], "4096 tokens are longer"),
        (["--needle", "--haystack", "short.txt"], "short.txt"),
        (["--needle", "--haystack", "none.txt"], "none.txt"),
        (["--window", "5"], "--window 5 has no effect"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_are_one_message(
    words: list[str],
    named: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (folder / "half.json").write_text(json.dumps([SKY, SKY | {"answer": None}]))
    (folder / "one.json").write_text(json.dumps([SKY | {"choices": ["red", ""]}]))
    (folder / "short.txt").write_text(pico_text(50))
    monkeypatch.setenv("COLUMNS", "400")
    assert refused(["evaluate", "source", "--device", "cpu", *words], capsys).count(named) >= 1


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Message of a command that must be refused, before any model is loaded."""
    capsys.readouterr()
    try:
        code = main(words)
    except SystemExit as stopped:  # of the parser
        code = int(str(stopped.code))
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    assert "Loading" not in captured.err
    assert "Traceback" not in captured.err
    return " ".join(captured.err.replace("│", " ").split())


@pytest.mark.parametrize("name", ["source", "out"])
@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_model_without_a_tokenizer(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(tmp_path)
    for path in (tmp_path / name).glob("tokenizer*"):
        path.unlink()
    words = [command, str(tmp_path / name), *(["Hello"] if command == "generate" else [])]
    message = refused(words, capsys)
    assert "no tokenizer in the folder" in message
    assert message.count(f"care {command}:") == 1


def test_without_lm_eval_the_extra_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = refused(["evaluate", "source", "--tasks", "sky.json"], capsys)
    assert "pip install 'care-mla[eval]'" in message


def test_answers_stand_side_by_side(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "source", "source", "out", "other", "The old teacher", "--max-new-tokens", "12"]
    assert main([*words, "--device", "cpu", "--json", "answers.json"]) == 0
    out = capsys.readouterr().out
    body = json.loads((folder / "answers.json").read_text())
    assert body["format"] == "care-mla/generate/1"
    assert body["chat_template"] is True
    first, again, converted, other = body["models"]
    assert again["tokens"] == first["tokens"]
    assert again["parts_at"] is None
    place = converted["parts_at"]
    assert converted["tokens"][:place] == first["tokens"][:place]
    assert converted["tokens"][place] != first["tokens"][place]
    assert "".join(first["pieces"]).startswith(first["text"])
    assert other["same_tokens"] is False
    assert "[[" in out
    assert "the same, token by token" in out
    assert "another tokenizer" in out


def test_the_greedy_answer_is_that_of_transformers(folder: Path) -> None:
    words = ["generate", "out", "The old teacher", "--max-new-tokens", "10", "--chat-template", "off"]
    assert main([*words, "--device", "cpu", "--quiet", "--json", "answers.json"]) == 0
    tokenizer = AutoTokenizer.from_pretrained("out")
    model = AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32)
    prompt = tokenizer("The old teacher", return_tensors="pt")
    output_BL = model.generate(**prompt, max_new_tokens=10, do_sample=False)
    expected = output_BL[0, prompt["input_ids"].shape[1] :].tolist()
    (row,) = json.loads((folder / "answers.json").read_text())["models"]
    assert row["tokens"] == expected
    assert row["ended"] is (expected[-1] == 1)


def test_drawn_answers_follow_the_seed(folder: Path) -> None:
    tokens = []
    for seed in ("0", "0", "1"):
        words = ["generate", "source", "source", "The", "--temperature", "1", "--seed", seed]
        words += ["--max-new-tokens", "16"]
        assert main([*words, "--device", "cpu", "--quiet", "--json", "answers.json"]) == 0
        rows = json.loads((folder / "answers.json").read_text())["models"]
        assert rows[1]["parts_at"] is None  # the same random numbers for every model
        tokens.append(rows[0]["tokens"])
    assert tokens[0] == tokens[1] != tokens[2]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["generate"], "A model and a prompt are needed"),
        (["generate", "source"], "A model and a prompt are needed"),
        (["generate", "source", "Hi", "--temperature", "-1"], "--temperature -1"),
        (["generate", "source", "Hi", "--max-new-tokens", "2000"], "longer than the context of source, 1024"),
        (["generate", "bare", "Hi", "--chat-template", "on"], "bare comes without a chat template"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_prompts_that_cannot_be_answered(
    words: list[str],
    named: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    if "bare" in words:
        pico_model(folder / "bare")
        (folder / "bare" / "chat_template.jinja").unlink()
    assert named in refused(words, capsys)


def test_where_answers_part() -> None:
    assert parting([1, 2, 3], [1, 2, 3]) is None
    assert parting([1, 2, 3], [1, 4, 3]) == 1
    assert parting([1, 2], [1, 2, 3]) == parting([1, 2, 3], [1, 2]) == 2
