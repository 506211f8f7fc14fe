"""Checkpoints of a training: whole or absent, the newest, the best, damaged ones, a full disk."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from care_mla import console
from care_mla.errors import CheckpointError
from care_mla.heal.checkpoints import Checkpoints, RunState
from care_mla.workspace import Workspace


def state_of(*kl: float) -> RunState:
    """After measurements every ten steps, the first one before training."""
    held_out = [(10 * i, value, 2 * value) for i, value in enumerate(kl)]
    last = held_out[-1][0]
    rows = [{"step": step, "loss": 1 / step} for step in range(1, last + 1)]
    return RunState(last, 1.5 * last, rows, held_out)


def weights_of(step: int) -> dict[str, Tensor]:
    return {"w": torch.full((50,), float(step)), "b": torch.tensor([step + 0.1])}


def moments_of(step: int) -> dict[str, Tensor]:
    return {"w::exp_avg": torch.full((50,), -float(step)), "w::step": torch.tensor(float(step))}


def run(folder: Path, *kl: float) -> Checkpoints:
    """A training that measured these divergences."""
    checkpoints = Checkpoints(Workspace(folder))
    for count in range(1, len(kl) + 1):
        state = state_of(*kl[:count])
        checkpoints.save(state, weights_of(state.step), moments_of(state.step))
    return checkpoints


def names(checkpoints: Checkpoints) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in checkpoints.folder.iterdir())


@pytest.fixture(autouse=True)
def _no_warnings() -> None:
    console.current().warnings.clear()


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    checkpoints = run(tmp_path, 3.0, 2.0, 1.0)
    found = checkpoints.newest()
    assert found is not None
    state, weights, moments = found
    assert state == state_of(3.0, 2.0, 1.0)
    for tensors, expected in ((weights, weights_of(20)), (moments, moments_of(20))):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in tensors)


@pytest.mark.parametrize(
    ("kl", "kept"),
    [
        ((5.0, 4.0, 3.0, 2.0), [20, 30]),
        ((5.0, 1.0, 3.0, 2.0, 2.5), [10, 30, 40]),
        ((1.0, 2.0, 3.0, 4.0), [0, 20, 30]),
        # The newest is the best: until it came, step 10 was, and may be again if the newest is damaged.
        ((5.0, 3.0, 4.0, 3.5, 1.0), [10, 30, 40]),
    ],
)
def test_the_newest_two_and_the_best_stay(kl: tuple[float, ...], kept: list[int], tmp_path: Path) -> None:
    checkpoints = run(tmp_path, *kl)
    assert names(checkpoints) == kept
    row, weights = checkpoints.best(state_of(*kl))
    assert row[1] == min(kl)
    assert weights["w"][0] == row[0]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=lambda f: f.__name__)
def test_a_damaged_newest_one_falls_back_to_the_one_before(file: str, damage, tmp_path: Path) -> None:
    checkpoints = run(tmp_path, 5.0, 4.0, 3.0)
    damage(checkpoints.folder / "step_00000020" / file)
    if (file, damage) == ("state.json", flip):
        cut(checkpoints.folder / "step_00000020" / file)  # its last byte is a line break
    found = checkpoints.newest()
    assert found is not None
    assert found[0] == state_of(5.0, 4.0)
    assert found[1]["w"][0] == 10
    assert names(checkpoints) == [10]
    (warning,) = console.current().warnings
    assert "step_00000020 is damaged" in warning
    assert "the one before" in warning


def test_a_damaged_best_one_is_named_and_the_next_is_taken(tmp_path: Path) -> None:
    kl = (5.0, 1.0, 3.0, 2.0, 2.5)
    checkpoints = run(tmp_path, *kl)
    cut(checkpoints.folder / "step_00000010" / "weights.safetensors")
    row, weights = checkpoints.best(state_of(*kl))
    assert (row[0], weights["w"][0]) == (30, 30)
    (warning,) = console.current().warnings
    assert "step_00000010 is damaged" in warning
    shutil.rmtree(checkpoints.folder)
    with pytest.raises(CheckpointError, match="rm -r"):
        checkpoints.best(state_of(*kl))


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert Checkpoints(Workspace(tmp_path)).newest() is None


def test_an_unfinished_one_is_none(tmp_path: Path) -> None:
    checkpoints = run(tmp_path, 5.0, 4.0)
    shutil.copytree(checkpoints.folder / "step_00000010", checkpoints.folder / ".step_00000020.partial")
    found = checkpoints.newest()
    assert found is not None
    assert found[0].step == 10
    checkpoints.save(state_of(5.0, 4.0, 3.0), weights_of(20), moments_of(20))
    assert names(checkpoints) == [10, 20]


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """What a full disk does, in this process alone: a file cannot grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 100, 400], ids=lambda room: f"{room} bytes")
def test_a_full_disk_is_said_and_leaves_what_was_there(room: int, tmp_path: Path) -> None:
    checkpoints = run(tmp_path, 5.0, 4.0)
    refused = pytest.raises(CheckpointError, match=r"step_00000020 could not be written .*are kept.*again")
    with files_of_at_most(room), refused:
        checkpoints.save(state_of(5.0, 4.0, 3.0), weights_of(20), moments_of(20))
    assert names(checkpoints) == [0, 10]
    found = checkpoints.newest()
    assert found is not None
    assert found[0].step == 10
