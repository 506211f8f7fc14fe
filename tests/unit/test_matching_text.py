"""Text for block matching: the statistics' own first, more where asked for, nothing that is held out."""
# Shapes: B blocks, L positions.

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from care_mla.calibrate.matching_text import matching_blocks
from care_mla.checkpoint.opening import open_source
from care_mla.checkpoint.source import Source
from care_mla.console import Console
from care_mla.errors import CalibrationError
from care_mla.workspace import Workspace
from unit.test_data import Options, prepare, text_file

from pico import pico_model

POSITIONS = 96


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("data") / "model"
    return open_source(str(pico_model(folder, max_position_embeddings=POSITIONS)))


def more(source: Source, calibration: str, folder: Path, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(blocks to match on, blocks of the statistics, held-out blocks)."""
    blocks, _ = prepare(source, calibration, folder)
    matching_BL = matching_blocks(
        source,
        Options(calibration),
        Workspace(folder),
        blocks,
        count,
        tokens=200,
        sequence_length=16,
        rotation_length=64,
        device=torch.device("cpu"),
        console=Console(quiet=True),
    )
    return matching_BL, blocks.short_BL, blocks.held_out_BL


def runs(blocks_BL: Tensor, length: int = 12) -> set[tuple[int, ...]]:
    """All runs of so many tokens: text does not repeat that many."""
    return {tuple(row[i : i + length].tolist()) for row in blocks_BL for i in range(len(row) - length + 1)}


def test_few_tokens_are_the_statistics(tmp_path: Path, source: Source) -> None:
    path, _ = text_file(tmp_path, source, 3000)
    matching_BL, short_BL, _ = more(source, str(path), tmp_path / "work", 192)
    assert matching_BL.shape == (2, POSITIONS)
    assert torch.equal(matching_BL.flatten(), short_BL.flatten())
    assert not list((tmp_path / "work").glob("matching_*"))


def test_more_of_a_file_is_never_held_out_text(tmp_path: Path, source: Source) -> None:
    path, tokens_T = text_file(tmp_path, source, 3000)
    free = 3000 - 2 * POSITIONS
    matching_BL, _, held_out_BL = more(source, str(path), tmp_path / "work", free // POSITIONS * POSITIONS)
    assert matching_BL.numel() > 0.9 * len(tokens_T)
    assert runs(matching_BL) & runs(tokens_T[None])
    assert not runs(matching_BL) & runs(held_out_BL)


def test_own_text_goes_on_where_the_statistics_and_what_is_held_out_end(
    tmp_path: Path, source: Source
) -> None:
    matching_BL, short_BL, held_out_BL = more(source, "self", tmp_path / "work", 384)
    assert matching_BL.shape == (4, POSITIONS)
    assert torch.equal(matching_BL.flatten()[: short_BL.numel()], short_BL.flatten())
    assert not runs(matching_BL) & runs(held_out_BL)
    new = matching_BL.flatten()[short_BL.numel() :].view(-1, 16)
    # None is written twice, but a random model may fall into the same loop twice.
    assert len({tuple(row.tolist()) for row in new}) >= len(new) - 1
    again_BL, *_ = more(source, "self", tmp_path / "again", 384)
    assert torch.equal(matching_BL, again_BL)


def test_too_little_text_says_how_much_there_is(tmp_path: Path, source: Source) -> None:
    path, _ = text_file(tmp_path, source, 1000)
    with pytest.raises(CalibrationError, match="--match-tokens 808"):
        more(source, str(path), tmp_path / "work", 900)
