"""A sweep interrupted anywhere, any number of times, and run again gives the files of one that never was."""
# Shapes: B sequences, L positions.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from care_mla.calibrate import stream
from care_mla.calibrate.layers import LayerStack
from care_mla.calibrate.stream import collect_rotation, collect_statistics
from care_mla.checkpoint.opening import open_source
from care_mla.workspace import Workspace

from pico import pico_model

LENGTH, SEQUENCES, LONG = 6, 5, 10


class Interrupted(BaseException):
    """Like a signal: nothing catches it."""


class InterruptedWorkspace(Workspace):
    """Goes away when a file is about to be looked for, read, written or removed for the n-th time."""

    def __init__(self, folder: Path, accesses: int) -> None:
        super().__init__(folder)
        self.left = accesses

    def path(self, *parts: str) -> Path:
        self.left -= 1
        if self.left == 0:
            raise Interrupted
        return super().path(*parts)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LayerStack]:
    folder = pico_model(tmp_path_factory.mktemp("pico") / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "MICRO_BATCH_TOKENS", 2 * LENGTH)
        yield LayerStack(open_source(str(folder)), device=torch.device("cpu"))


def sweep(stack: LayerStack, workspace: Workspace, chunk_blocks: int = 2) -> None:
    tokens_BL = torch.randint(320, (SEQUENCES + 2, LONG), generator=torch.Generator().manual_seed(0))
    collect_rotation(stack, tokens_BL[:2], workspace, lambda: None)
    collect_statistics(
        stack, tokens_BL[2:, :LENGTH], workspace, seed=0, chunk_blocks=chunk_blocks, advance=lambda: None
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(
    stack: LayerStack, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, bytes], int]:
    """The files of a run, and how often it accessed them."""
    workspace = InterruptedWorkspace(tmp_path_factory.mktemp("work"), 0)
    sweep(stack, workspace)
    return files(workspace.folder), -workspace.left


def interrupted(stack: LayerStack, accesses: list[int]) -> dict[str, bytes]:
    """Files of a run that was interrupted so often, each time at the given access, and then ran through."""
    with TemporaryDirectory() as folder:
        for left in accesses:
            with suppress(Interrupted):
                sweep(stack, InterruptedWorkspace(Path(folder), left))
        sweep(stack, Workspace(Path(folder)))
        return files(Path(folder))


def test_interrupted_once_anywhere(stack: LayerStack, uninterrupted: tuple[dict[str, bytes], int]) -> None:
    expected, total = uninterrupted
    for access in range(1, total + 1):
        assert interrupted(stack, [access]) == expected, access


@settings(max_examples=25, deadline=None)
@given(accesses=st.lists(st.integers(1, 100), min_size=2, max_size=5))
def test_interrupted_again_and_again(
    stack: LayerStack, uninterrupted: tuple[dict[str, bytes], int], accesses: list[int]
) -> None:
    assert interrupted(stack, accesses) == uninterrupted[0]


@settings(max_examples=8, deadline=None)
@given(chunk_blocks=st.integers(1, 8))
def test_any_chunks_give_the_same_sums(
    stack: LayerStack, uninterrupted: tuple[dict[str, bytes], int], chunk_blocks: int
) -> None:
    def without_header(found: dict[str, bytes]) -> dict[str, bytes]:
        # Which says how many chunks there were.
        return {name: data[8 + int.from_bytes(data[:8], "little") :] for name, data in found.items()}

    with TemporaryDirectory() as folder:
        sweep(stack, Workspace(Path(folder)), chunk_blocks)
        assert without_header(files(Path(folder))) == without_header(uninterrupted[0])
