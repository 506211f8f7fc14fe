"""docs/models.md: every cell of its table, measured again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from care_mla.families import FAMILIES
from family_cells import APPROXIMATE, EXACT, REFUSED, ROWS, as_json, measure

ROOT = Path(__file__).parents[2]
FAMILIES_JSON = json.loads((ROOT / "benchmarks" / "engines" / "families.json").read_text(encoding="utf-8"))


def test_every_family_has_a_row() -> None:
    assert set(FAMILIES_JSON["rows"]) == set(ROWS)
    assert {row["architecture"] for row in FAMILIES_JSON["rows"].values()} == set(FAMILIES)


@pytest.mark.parametrize("name", ROWS)
def test_cells_are_as_written(name: str, tmp_path: Path) -> None:
    measured = measure(ROWS[name], tmp_path)
    written = FAMILIES_JSON["rows"][name]
    assert bool(measured.needs_healing) == bool(written["needs_healing"])
    for found, expected in zip(as_json(measured), written["cells"], strict=True):
        assert found["status"] == expected["status"], (found, expected)
        assert found.get("reason") == expected.get("reason")
        if found["status"] in (EXACT, APPROXIMATE):
            assert found["relative_error"] < 1e-4
        if found["status"] == APPROXIMATE:
            assert found["kl"] == pytest.approx(expected["kl"], rel=0.2)
        if found["status"] == REFUSED and "relative_error" in found:
            assert found["relative_error"] > 1e-2
