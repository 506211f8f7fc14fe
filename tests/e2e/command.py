"""The command `care` as a shell runs it, and what tests look at afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CARE = str(Path(sys.executable).with_name("care"))  # the script that pip installed
# One thread, no network, and a terminal wide enough that no message is wrapped.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
# Few tokens and a device named, so that every machine does the same.
FAST = ("--calibration-tokens", "1024", "--sequence-length", "128", "--device", "cpu")


@dataclass(frozen=True)
class Done:
    """How a command ended. `json` is the content of --json, if there was one."""

    code: int
    out: str
    err: str
    json: Any


def care(folder: Path, *words: str | Path) -> Done:
    """Run a command in a folder. Its result is asked for as JSON where the command makes one."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    done = subprocess.run(
        [CARE, *map(str, words), "--json", "result.json"],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    body = json.loads(result.read_text()) if result.exists() else None
    return Done(done.returncode, done.stdout, done.stderr, body)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by its relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def modified(folder: Path) -> dict[str, int]:
    """When every file below a folder was last written, in nanoseconds, by its relative path."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()
    }
