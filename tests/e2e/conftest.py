"""One pico model with its texts, and one conversion of it, for all end-to-end tests of a process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from e2e.command import FAST, Done, care

from pico import pico_model, pico_text


@dataclass(frozen=True)
class Conversion:
    """A folder with `model`, `calibration.txt`, `text.txt`, and what `care convert model OUT` made there."""

    folder: Path
    done: Done

    @property
    def output(self) -> Path:
        return self.folder / "OUT"

    @property
    def work(self) -> Path:
        return self.folder / "OUT.work"


def make_input(folder: Path, **options: object) -> Path:
    """A folder with a pico model of three layers and the texts to calibrate and to measure on."""
    pico_model(folder / "model", layers=3, **options)  # type: ignore[arg-type]
    (folder / "calibration.txt").write_text(pico_text(7000))
    (folder / "text.txt").write_text(pico_text(1200, seed=5))
    return folder


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """Converted once by the default method at half of the cache; tests leave it as it is."""
    folder = make_input(tmp_path_factory.mktemp("converted"))
    return Conversion(
        folder, care(folder, "convert", "model", "OUT", "--calibration", "calibration.txt", *FAST)
    )
