"""Writing a converted model: safetensors shards in a stream, in a folder that appears only when complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from care_mla.errors import CareError, OptionError
from care_mla.workspace import write_json


class ShardWriter:
    """Writes tensors in the order in which they come, and holds no more than one shard of them.

    One shard becomes `model.safetensors`, several become `model-0000k-of-0000n.safetensors` and their index.

    Args:
        folder: created.
        max_shard_bytes: a tensor larger than this gets a shard of its own.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = 5 * 2**30) -> None:
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self.total_bytes = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor, from any device; it must not be changed until the writer is closed."""
        assert name not in self._names, name
        self._names.add(name)
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            # A slice would keep the whole tensor alive, and safetensors refuses tensors that share memory.
            tensor = tensor.clone()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def close(self) -> list[Path]:
        """Write the last shard and the index, and return the files of weights."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        if count == 1:
            path = self.folder / "model.safetensors"
            os.replace(self._temporary(0), path)
            return [path]
        paths, weight_map = [], {}
        for shard_idx, names in enumerate(self._shards):
            path = self.folder / f"model-{shard_idx + 1:05d}-of-{count:05d}.safetensors"
            os.replace(self._temporary(shard_idx), path)
            paths.append(path)
            weight_map |= dict.fromkeys(names, path.name)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / "model.safetensors.index.json", index)
        return paths

    def _temporary(self, shard_idx: int) -> Path:
        # How many shards there will be, which is a part of their names, is known only at the end.
        return self.folder / f"shard-{shard_idx + 1:05d}.tmp"

    def _flush(self) -> None:
        save_file(self._pending, self._temporary(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def require_disk(needed: Mapping[Path, int]) -> None:
    """Check that the disks under some folders, which need not exist yet, have room.

    Args:
        needed: bytes by folder; those on one disk are added.

    Raises:
        CareError: naming what is needed and what is free.
    """
    disks: dict[int, tuple[Path, int, int]] = {}
    for folder, nbytes in needed.items():
        existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        disk = existing.stat().st_dev
        first, total, free = disks.get(disk, (folder, 0, shutil.disk_usage(existing).free))
        disks[disk] = first, total + nbytes, free
    for folder, nbytes, free in disks.values():
        if free < nbytes:
            raise CareError(
                f"{folder}: {nbytes / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB are free on "
                "this disk. Nothing was written. Free some space, or choose an output and a --work FOLDER on "
                "another disk."
            )


@contextmanager
def atomic_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name when the block ends without an exception.

    On failure or interruption nothing is left, and an earlier output stays as it was.

    Args:
        output: the folder to be.
        overwrite: whether an earlier one is replaced.

    Raises:
        OptionError: `output` exists and `overwrite` is off, or it is nothing that this tool wrote.
    """
    output = output.absolute()
    check_output(output, overwrite)
    partial = output.with_name(f".{output.name}.partial")
    previous = output.with_name(f".{output.name}.previous")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if output.exists():
            shutil.rmtree(previous, ignore_errors=True)
            output.rename(previous)
        partial.rename(output)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_file(output: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary file beside `output` that takes its name when the block ends without an exception.

    Raises:
        OptionError: `output` exists and `overwrite` is off, or it is a folder.
    """
    output = output.absolute()
    check_output_file(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    try:
        yield partial
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)


def check_output_file(output: Path, overwrite: bool) -> None:
    """Check that `atomic_file` may write `output`, before the work that fills it.

    Raises:
        OptionError: `output` exists and `overwrite` is off, or it is a folder.
    """
    if output.is_dir():
        raise OptionError(f"{output} is a folder, and the output is a file. Choose another name.")
    if output.exists() and not overwrite:
        raise OptionError(
            f"{output} exists already. Nothing was changed. Choose another name, or add --overwrite."
        )


def check_output(output: Path, overwrite: bool) -> None:
    """Check that `atomic_folder` may write `output`, before the work that fills it.

    Raises:
        OptionError: `output` exists and `overwrite` is off, or it is nothing that this tool wrote.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise OptionError(f"{output} is a file, and the output is a folder. Choose another name.")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise OptionError(
            f"{output} exists already. Nothing was changed. Choose another name, or add --overwrite."
        )
    if not (output / "config.json").is_file():
        raise OptionError(
            f"{output} holds no config.json, so it is no model folder, and --overwrite would delete what is "
            "in it. Nothing was changed. Choose another name, or remove the folder yourself."
        )
