"""Converts a pico model of every family in every profile, verifies each in its engine, and writes it down.

    python benchmarks/engines/run_families.py families.json

About five minutes on two cores. docs/models.md is made from the result by benchmarks/tables.py.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from care_mla.versions import versions
from care_mla.workspace import write_json

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from family_cells import ROWS, as_json, measure


def main() -> None:
    """Measure all rows and write the JSON."""
    rows = {}
    for name, row in ROWS.items():
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(row, Path(folder))
        rows[name] = {
            "architecture": measured.facts.architecture,
            "needs_healing": measured.needs_healing,
            "vllm_case": row.vllm_case,
            "cells": as_json(measured),
        }
    write_json(Path(sys.argv[1]), {"format": "care-mla/families/1", "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
