"""Checkpoints of a training run: weights that train, the optimiser's state, and how far the run is.

Each is a folder `checkpoints/step_00000040` in the work folder, written under another name and renamed when
it is complete, with the hash of every file in it. Plain safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from care_mla import console as terminal
from care_mla.errors import CheckpointError
from care_mla.workspace import Workspace, save_tensors, write_json

FOLDER, STATE = "checkpoints", "state.json"
WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"
KEPT = 2


@dataclass
class RunState:
    """How far a run is; everything else that it depends on follows from the options and `step`.

    Attributes:
        step: steps that are done.
        elapsed: seconds of training, over all processes that worked on it.
        steps: a row for each step that is done.
        held_out: [step, KL, cross-entropy] of every measurement.
    """

    step: int = 0
    elapsed: float = 0.0
    steps: list[dict[str, float]] = field(default_factory=list)
    held_out: list[tuple[int, float, float]] = field(default_factory=list)

    @property
    def best(self) -> tuple[int, float, float]:
        """The measurement with the lowest KL, the first of equals."""
        return min(self.held_out, key=lambda row: (row[1], row[0]))

    @property
    def measurements_since_best(self) -> int:
        """How many came after the best one."""
        return sum(step > self.best[0] for step, *_ in self.held_out)


class Checkpoints:
    """The newest `KEPT` checkpoints of a run, and the best one as each of them knows it.

    Args:
        workspace: the run's.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.folder = workspace.path(FOLDER)

    def save(self, state: RunState, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Write a checkpoint, then remove those that are not needed any more.

        Raises:
            CheckpointError: the disk does not take it; the checkpoints before stay.
        """
        final = self._path(state.step)
        partial = final.with_name(f".{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            save_tensors(partial / WEIGHTS, weights)
            save_tensors(partial / OPTIMIZER, optimizer)
            hashes = {name: _digest(partial / name) for name in (WEIGHTS, OPTIMIZER)}
            write_json(partial / STATE, {"hashes": hashes, "state": asdict(state)})
            _to_disk(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{final} could not be written ({error}). The checkpoints before it are kept. Make room, and "
                "type the same command again: it goes on from the newest of them."
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._remove_old(state)

    def newest(self) -> tuple[RunState, dict[str, Tensor], dict[str, Tensor]] | None:
        """The newest checkpoint that is whole; damaged ones are named, removed and passed over."""
        for path in sorted(self.folder.glob("step_*"), reverse=True):
            problem, state = _check(path)
            if state is not None:
                return state, load_file(path / WEIGHTS), load_file(path / OPTIMIZER)
            terminal.current().warn(
                f"{path} is damaged ({problem}); it is removed, and training goes on from the one before it."
            )
            shutil.rmtree(path)
        return None

    def best(self, state: RunState) -> tuple[tuple[int, float, float], dict[str, Tensor]]:
        """The best measurement whose checkpoint is whole, and its weights; damaged ones are named.

        Raises:
            CheckpointError: none is.
        """
        for row in sorted(state.held_out, key=lambda row: (row[1], row[0])):
            path = self._path(row[0])
            if row != state.best and not path.exists():
                continue  # it was removed when a better one came
            problem, whole = _check(path)
            if whole is not None:
                return row, load_file(path / WEIGHTS)
            terminal.current().warn(
                f"{path} is damaged ({problem}), so the weights written are not the best that training found."
            )
        raise CheckpointError(
            f"{self.folder}: no checkpoint is whole. Train again in an empty folder: rm -r {self.folder}"
        )

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08}"

    def _remove_old(self, state: RunState) -> None:
        # If the newest is found damaged, the run goes back by one measurement, and to the best until then.
        before = replace(state, held_out=state.held_out[:-1] or state.held_out)
        kept = {self._path(state.best[0]), self._path(before.best[0])}
        for path in sorted(self.folder.glob("step_*"), reverse=True)[KEPT:]:
            if path not in kept:
                shutil.rmtree(path)


def _check(path: Path) -> tuple[str, RunState | None]:
    """What is wrong with a checkpoint, or its state."""
    try:
        stored: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
        for name, digest in stored["hashes"].items():
            if _digest(path / name) != digest:
                return f"{name} is not what was written", None
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}", None
    state = RunState(**stored["state"])
    state.held_out = [(int(step), kl, ce) for step, kl, ce in state.held_out]
    return "", state


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(folder: Path) -> None:
    """Wait until the files are on the disk, so that no power cut leaves a name without its content."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
