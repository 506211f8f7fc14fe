"""The JSON files of a folder that commands of `care` wrote, by command."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from care_mla.errors import OptionError

FORMAT = re.compile(r"care-mla/([a-z-]+)/(\d+)")
VERSION = "1"


@dataclass(frozen=True)
class Result:
    """What one command wrote.

    Attributes:
        name: of the file, without its ending.
        body: the whole JSON.
    """

    name: str
    command: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Results:
    """Everything that a folder holds, in the order of the files' names."""

    folder: Path
    found: list[Result] = field(default_factory=list)

    def of(self, command: str) -> list[Result]:
        """The results of one command."""
        return [result for result in self.found if result.command == command]


def read_results(folder: Path) -> Results:
    """Read every `care-mla/*` JSON of a folder; JSON of other programs is passed over.

    Raises:
        OptionError: there is no such folder, nothing of ours is in it, or a file is broken or of another
            version.
    """
    if not folder.is_dir():
        raise OptionError(
            f"{folder} is not a folder. care report reads the JSON that other commands wrote into one. Make "
            f"some: care convert MODEL OUT --json {folder / 'convert.json'}"
        )
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OptionError(f"{path}: not JSON ({error}). Write it again, or take it away.") from error
        said = body.get("format") if isinstance(body, dict) else None
        match = FORMAT.fullmatch(said) if isinstance(said, str) else None
        if match is None:
            continue
        if match[2] != VERSION:
            raise OptionError(
                f"{path}: format {said} is not of this version, which reads care-mla/{match[1]}/{VERSION}. "
                f"Write it again with this care, or take it away: care {match[1]} … --json {path}"
            )
        found.append(Result(path.stem, match[1], body))
    if not found:
        raise OptionError(
            f"{folder}: no JSON of care is in it, so there is nothing to show. Every command writes one with "
            f"--json, such as care convert MODEL OUT --json {folder / 'convert.json'}"
        )
    return Results(folder, found)
