"""Writes `report.html`: one page about every result in a folder, which needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from care_mla.report.read import ReportError, Results, read_results
from care_mla.report.sections import sections
from care_mla.report.verdict import verdicts
from care_mla.workspace import write_text

NAME = "report.html"
# By this a page of ours is known, and replaced; any other file of the name is left alone.
MARK = '<meta name="generator" content="care report">'


def write_report(folder: Path, names: Sequence[str] = ()) -> Path:
    """Write FOLDER/report.html; returns its path.

    Args:
        names: of the files to show; all JSON in the folder if empty.

    Raises:
        ReportError: no result is there, one cannot be read, or the file there is not a report of ours.
    """
    path = check_report(folder)
    write_text(path, page(read_results(folder, names)))
    return path


def check_report(folder: Path) -> Path:
    """Where the report goes, if nothing else is there.

    Raises:
        ReportError: a file of that name is not a report of ours.
    """
    path = folder / NAME
    if path.exists() and not (path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")):
        raise ReportError(
            f"{path} exists, and care report did not write it, so it was left as it is. Move it: "
            f"mv {path} {path}.old"
        )
    return path


def page(results: Results) -> str:
    """The page as HTML."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = (files("care_mla.report") / "page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        mark=MARK,
        folder=results.folder.resolve().name,
        verdicts=verdicts(results),
        sections=sections(results),
    )
