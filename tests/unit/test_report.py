"""`care report`: what is in the JSON is on the page, what is not is left out, and nothing else is needed."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from care_mla.cli.main import main
from care_mla.errors import OptionError
from care_mla.report import figures
from care_mla.report.page import GENERATOR, number, page, write_report
from care_mla.report.read import read_results

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
VERSIONS = {"care_mla": "0.1.0", "torch": "2.13.0"}
LAYERS: list[dict[str, Any]] = [
    {
        "rank": 20 + i,
        "ranks": [8 + i, 12],
        "predicted_error": 0.01 * (i + 1),
        "spectrum": [1.0, 0.5, 0.01],
        "gamma": [0.1, 0.5, 0.9],
        "match": {"error_before": 0.2, "error_after": 0.1},
    }
    for i in range(3)
]
VERIFY = {"engine": "transformers", "relative_error": 7e-7, "greedy_equal": True, "passed": True}
NEEDLE = {"lengths": [1024, 2048], "depths": [0.0, 0.5, 1.0], "score": [[1.0, 0.5, 0.0], [0.25, 0.75, 1.0]]}


def bodies() -> dict[str, dict[str, Any]]:
    """A body of each command, with all that the page shows."""
    return {
        "convert": {
            "cached_values": {"original": 384, "converted": 192}, "output": "OUT", "method": "fisher",
            "form": "decoupled", "held_out_kl": 0.19, "needs_healing": [], "layers": LAYERS, "verify": VERIFY,
        },
        "compare": {
            "original": {"perplexity": 20.5, "cached_values": 384},
            "rows": [
                {"method": method, "form": form, "cached_values": 192, "perplexity": value, "kl": 0.2}
                for method, form, value in (("fisher", "decoupled", 25.25), ("svd", "exact-rope", 31234.0))
            ],
        },
        "evaluate": {
            "models": [
                {
                    "model": name, "cached_values": cache, "cache_bytes_per_token": 4 * cache,
                    "perplexity": {"wiki": {"value": value, "tokens": 2046, "block": 1024}},
                    "tasks": {"arc": {"acc": 0.25, "acc_norm": 0.5, "items": 4}}, "needle": NEEDLE,
                }
                for name, cache, value in (("demo", 384, 20.5), ("some/OUT", 192, 25.25))
            ]
        },
        "heal": {
            "steps": [{"step": 1, "loss": 0.3, "kl": 0.3}, {"step": 2, "loss": 0.2, "kl": 0.2}],
            "measurements": [{"step": 0, "kl": 0.4}, {"step": 2, "kl": 0.21}], "tokens_per_step": 2048,
            "held_out": {"before": 0.4, "after": 0.21}, "output": "HEALED",
            "verify": VERIFY | {"passed": False},
        },
    }  # fmt: skip


def write(folder: Path, found: dict[str, dict[str, Any]]) -> Path:
    for command, body in found.items():
        head = {"format": f"care-mla/{command}/1", "versions": VERSIONS, "seconds": 1.0}
        (folder / f"{command}.json").write_text(json.dumps(head | body))
    return folder


class Page(HTMLParser):
    """Checks that every element is closed, and collects text, tags and addresses."""

    VOID = ("meta", "br", "path", "use", "image", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_full_page_stands_alone(tmp_path: Path) -> None:
    text = page(read_results(write(tmp_path, bodies())))
    found = Page(text)
    assert not re.search(r"https?:|<script|@import|src=", text)
    assert len(set(found.ids)) == len(found.ids)
    for said in (
        "192 of 384 cached values per token and layer (50% saved), by fisher in the decoupled form",
        "Passed: OUT in transformers: relative error 7.0e-07", "Failed: HEALED", "healed from 0.4 to 0.21",
        "Before and after", "25.25", "31,234", "arc, acc_norm", "Methods at an equal cache", "Healing",
        "Numbers hidden in long text", "2.13.0", "svd, exact-rope",
    ):  # fmt: skip
        assert said in found.text, said
    assert 'class="verdict bad"' in text
    # Errors, ranks, spectra, gamma and matching of the conversion; methods; a curve; a map for each model.
    assert found.tags.count("svg") == 5 + 1 + 1 + 2


@pytest.mark.parametrize(
    ("command", "heading"),
    [
        ("convert", "Layer by layer"),
        ("compare", "Methods"),
        ("evaluate", "Before and after"),
        ("heal", "Healing"),
    ],
)
def test_what_is_not_there_is_left_out(command: str, heading: str, tmp_path: Path) -> None:
    found = Page(page(read_results(write(tmp_path, {command: bodies()[command]}))))
    headings = ["Layer by layer", "Methods", "Before and after", "Healing"]
    assert [each for each in headings if each in found.text] == [heading]


def test_figures_say_what_the_data_say() -> None:
    svg = figures.pareto([bodies()["compare"]])
    assert svg is not None
    text = Page(svg).text
    assert "original: 20.5 with 384 values" in text
    assert "fisher, decoupled" in text
    maps = Page(figures.needle("demo", NEEDLE)).text
    assert all(said in maps for said in ("1,024", "2,048", "50%", "25%", "75%"))
    ranks = figures.rank_profile(LAYERS)
    assert ranks is not None
    assert "keys" in Page(ranks).text
    spectra = figures.spectra([row | {"rank": 2} for row in LAYERS])
    assert spectra is not None
    assert "rank 2" in Page(spectra).text


def test_figures_without_data() -> None:
    bare = [
        {"rank": 4, "ranks": [4], "predicted_error": None, "spectrum": [], "gamma": None, "match": None}
    ] * 2
    assert figures.pareto([]) is None
    for draw in (
        figures.layer_errors,
        figures.rank_profile,
        figures.spectra,
        figures.rotation,
        figures.matching,
    ):
        assert draw(bare) is None, draw


@pytest.mark.parametrize("value", [(192, "192"), (25.2549, "25.25"), (31234.4, "31,234"), (0.5, "0.5")])
def test_numbers(value: tuple[float, str]) -> None:
    assert number(value[0]) == value[1]


def test_committed_results_have_a_page(tmp_path: Path) -> None:
    """What commands really write, not what this test thinks that they do."""
    for path in [*BENCHMARKS.glob("one-shot/compare-*-seed0.json"), *BENCHMARKS.glob("convert/*.json")]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    found = Page(page(read_results(tmp_path)))
    assert "mha2mla-split" in found.text
    assert found.tags.count("svg") > 2


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, bodies())
    (tmp_path / "other.json").write_text('{"format": "somebody-else/1"}')
    assert main(["report", str(tmp_path), "--json", str(tmp_path / "report.json")]) == 0
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    first = (tmp_path / "report.html").read_text()
    assert GENERATOR in first
    # Its own page is made anew, and its own JSON disturbs nothing.
    assert main(["report", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no JSON of care is in it.*--json"),
        ({"x.json": "{"}, r"x\.json: not JSON"),
        ({"x.json": '{"format": "care-mla/compare/2"}'}, r"compare/2 is not of this version.*compare/1"),
        ({"x.json": '{"format": "care-mla/verify/1", "versions": {}, "engine": "vllm", "relative_error": 1, '
          '"greedy_equal": true, "passed": true}', "report.html": "<p>mine"}, "not written by care report"),
    ],
)  # fmt: skip
def test_bad_folders(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(OptionError, match=message):
        write_report(tmp_path)
    assert (tmp_path / "report.html").exists() == ("report.html" in files)


def test_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err
