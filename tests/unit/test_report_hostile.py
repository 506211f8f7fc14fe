"""What care report makes of results from somebody else: names are texts, never markup or formulas."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest

from care_mla.report.page import write_report
from care_mla.report.read import ReportError, read_results
from report_cases import BODIES, HEAD, write_result

HOSTILE = """<script>alert(1)</script>"'>&$x_{$ \\1 \\frac"""


@pytest.mark.parametrize("command", ["compare", "evaluate"])
def test_names_in_figures_are_no_markup_and_no_formulas(tmp_path: Path, command: str) -> None:
    body: dict[str, Any] = copy.deepcopy(BODIES[command])
    for row in body.get("rows", []):
        row["form"] = row["method"] = HOSTILE
    for model in body.get("models", []):
        model["model"] += HOSTILE
    write_result(tmp_path / """x"'><script>alert(2)<!--$a_{$.json""", command, body)
    page = write_report(tmp_path).read_text()
    assert "<svg" in page
    assert "<script" not in page
    ids = re.findall(r'id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[\w.-]+", each) for each in ids)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_original_without_a_perplexity_has_no_picture(tmp_path: Path, value: float) -> None:
    body: dict[str, Any] = copy.deepcopy(BODIES["compare"])
    body["original"]["perplexity"] = value
    write_result(tmp_path / "compare.json", "compare", body)
    assert "<svg" not in write_report(tmp_path).read_text()


@pytest.mark.parametrize(
    ("command", "path", "said"),
    [
        ("compare", ("original", "perplexity"), "original.perplexity is 0"),
        ("compare", ("rows", 1, "cached_values"), "rows[1].cached_values is 0"),
        ("convert", ("cached_values", "original"), "cached_values.original is 0"),
        ("evaluate", ("models", 1, "perplexity"), "models[1].perplexity is not an object"),
    ],
)
def test_what_nothing_can_be_divided_by_is_refused(
    tmp_path: Path, command: str, path: tuple[str | int, ...], said: str
) -> None:
    body: Any = copy.deepcopy(BODIES[command])
    place = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = 0
    write_result(tmp_path / "x.json", command, body)
    with pytest.raises(ReportError, match=re.escape(said)):
        read_results(tmp_path)


def test_rows_of_any_kind_and_heads_without_content_make_a_page(tmp_path: Path) -> None:
    empty: dict[str, Any] = dict.fromkeys(HEAD)
    write_result(tmp_path / "a.json", "bench", {"rows": [{"a": 1}, {"a": [{}, {}]}]} | empty)
    write_result(tmp_path / "b.json", "bench", {"rows": [{"a": 1}, 2]} | empty)
    write_result(tmp_path / "c.json", "convert", BODIES["convert"] | {"fingerprints": None})
    assert "2 values" in write_report(tmp_path).read_text()


def test_a_folder_that_is_called_like_a_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    with pytest.raises(ReportError, match=r"x\.json: it cannot be read"):
        read_results(tmp_path)
