"""What care report refuses: exit 2, one message that names all of it, nothing written."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from care_mla.cli.main import main
from care_mla.report.page import MARK, write_report
from care_mla.report.read import ReportError, read_results
from report_cases import BODIES, conversion, folder_with, write_result


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["report", str(folder)]) == 2
    assert not (folder / "report.html").exists() or MARK not in (folder / "report.html").read_text()
    return capsys.readouterr().err


def test_a_folder_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--json" in refused(tmp_path, capsys)
    assert "no such folder" in refused(tmp_path / "missing", capsys)


def test_all_json_that_cannot_be_read_is_named_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_with(tmp_path, "convert")
    write_result(tmp_path / "new.json", "convert", conversion(), version=2)
    (tmp_path / "other.json").write_text('{"name": "something"}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "cut.json").write_text(json.dumps(conversion())[:500])
    write_result(tmp_path / "lacks.json", "compare", {"rows": []})
    said = refused(tmp_path, capsys)
    assert "new.json: its format is 'care-mla/convert/2', and this version reads 'care-mla/convert/1'" in said
    assert "other.json: its format is None" in said
    assert "list.json" in said
    assert "cut.json: it is not JSON, or is cut off" in said
    assert "lacks.json: it says 'care-mla/compare/1', but original is missing" in said
    assert "convert.json:" not in said.replace("new.json", "")


@pytest.mark.parametrize(
    ("command", "path", "value", "said"),
    [
        ("convert", ("layers", 1, "gamma"), None, "layers[1].gamma is missing"),
        ("convert", ("layers", 0, "gamma"), [0.5], "layers have different numbers of gamma"),
        ("convert", ("layers",), [], "layers is empty"),
        ("convert", ("cached_values", "original"), "many", "cached_values.original is 'many'"),
        ("convert", ("verify", "passed"), "yes", "verify.passed is 'yes'"),
        ("compare", ("rows", 2, "perplexity"), None, "rows[2].perplexity is missing"),
        ("evaluate", ("models", 1, "perplexity"), {}, "models have different perplexity"),
        ("evaluate", ("models", 0, "needle", "score", 0), 1, "models[0].needle.score[0] is not a list"),
        ("evaluate", ("models", 0, "tasks", "arc_easy"), 1, "models[0].tasks.arc_easy is not an object"),
        ("heal", ("held_out",), None, "held_out is missing"),
        ("generate", ("models", 0, "text"), None, "models[0].text is missing"),
    ],
)
def test_a_damaged_result_is_refused_by_place(
    tmp_path: Path, command: str, path: tuple[str | int, ...], value: object, said: str
) -> None:
    body = copy.deepcopy(BODIES[command])
    place: Any = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    write_result(tmp_path / "x.json", command, body)
    with pytest.raises(ReportError, match=re.escape(said)):
        read_results(tmp_path)


def test_of_many_faults_a_few_are_told(tmp_path: Path) -> None:
    body = copy.deepcopy(conversion())
    for row in body["layers"]:
        row["ranks"] = []
    write_result(tmp_path / "x.json", "convert", body)
    with pytest.raises(ReportError, match=r"layers\[2\].ranks is empty, and 1 more"):
        read_results(tmp_path)


def test_a_page_of_somebody_else_stays_and_ours_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_with(tmp_path, "verify")
    (tmp_path / "report.html").write_text("<p>my own notes")
    assert "report.html exists, and care report did not write it" in refused(tmp_path, capsys)
    assert (tmp_path / "report.html").read_text() == "<p>my own notes"
    (tmp_path / "report.html").write_text(f"{MARK}<p>old")
    assert main(["report", str(tmp_path)]) == 0
    assert "Report: " in capsys.readouterr().out
    assert "<p>old" not in (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ReportError, match="did not write it"):
        write_report(tmp_path)


def test_named_files_alone_are_read(tmp_path: Path) -> None:
    folder_with(tmp_path, "verify", "heal")
    (tmp_path / "other.json").write_text("{}")
    assert "Healing" not in write_report(tmp_path, ["verify.json"]).read_text()
