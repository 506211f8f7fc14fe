"""Reads the results in a folder: the JSON that commands write with --json, format care-mla/<command>/1."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from care_mla.errors import CareError
from care_mla.report.shapes import faults

VERSION = 1
MOST_FAULTS = 3  # of one file, that a message tells
FORMAT = re.compile(r"care-mla/(?P<command>[a-z][a-z-]*)/(?P<version>\d+)")


class ReportError(CareError):
    """A folder's results cannot be read, or its report cannot be written."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What a conversion tells about one layer.

    Attributes:
        ranks: one, or those of K and V.
        spectra: squared singular values of what was cut, one list for each of `ranks`, largest first.
        gamma: by frequency, the mean over heads of |gamma|: 1 is a rotation that the heads do not see.
        rope_kept: by head, the share of what rotation changes that the RoPE key carries; empty: not known.
        match: errors of block matching, before and after; None without.
    """

    ranks: list[int]
    predicted_error: float
    spectra: list[list[float]]
    gamma: list[float]
    rope_kept: list[float]
    match: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """One file. `command` wrote it, `body` is all of it."""

    path: Path
    command: str
    body: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def layers(self) -> list[Layer]:
        """Of a conversion, in order."""
        return [_layer(row) for row in self.body["layers"]]


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything in a folder, each command's results in the order of their files' names."""

    folder: Path
    all: list[Result] = field(default_factory=list)

    def of(self, command: str) -> list[Result]:
        """The results that a command wrote."""
        return [result for result in self.all if result.command == command]


def read_results(folder: Path, names: Sequence[str] = ()) -> Results:
    """Read every JSON file that lies in a folder itself, or those of these names.

    Raises:
        ReportError: there is none, or one is not a result of this version; the message names all of these.
    """
    found, problems = [], []
    for path in [folder / name for name in names] or sorted(folder.glob("*.json")):
        result = _read(path)
        if isinstance(result, Result):
            found.append(result)
        else:
            problems.append(f"{path.name}: {result}")
    if problems:
        raise ReportError(
            f"{folder} holds JSON that this version of care cannot show, and no report was written. "
            f"{'; '.join(problems)}. Move it elsewhere, or make it again with this version."
        )
    if not found:
        raise ReportError(
            f"{folder} holds no result, so there is nothing to report. Commands write them with --json: "
            f"care convert MODEL OUT --json {folder}/convert.json"
        )
    return Results(folder=folder, all=found)


def _read(path: Path) -> Result | str:
    """The result in a file, or what is wrong with it."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return f"it is not JSON, or is cut off ({error})"
    said = body.get("format") if isinstance(body, dict) else None
    match = FORMAT.fullmatch(said) if isinstance(said, str) else None
    if match is None:
        return f"its format is {said!r}, and results of care say 'care-mla/COMMAND/{VERSION}'"
    if int(match["version"]) != VERSION:
        return f"its format is {said!r}, and this version reads 'care-mla/{match['command']}/{VERSION}'"
    if found := faults(match["command"], body):
        more = f", and {len(found) - MOST_FAULTS} more" if len(found) > MOST_FAULTS else ""
        return f"it says {said!r}, but {', '.join(found[:MOST_FAULTS])}{more}"
    return Result(path=path, command=match["command"], body=body)


def _layer(row: Mapping[str, Any]) -> Layer:
    spectrum = row["spectrum"]
    match = row.get("match")
    return Layer(
        ranks=list(row["ranks"]),
        predicted_error=row["predicted_error"],
        spectra=spectrum if spectrum and isinstance(spectrum[0], list) else [spectrum],
        gamma=row["gamma"],
        rope_kept=row.get("rope_kept") or [],
        match=(match["error_before"], match["error_after"]) if match else None,
    )
