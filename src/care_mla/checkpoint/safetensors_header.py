"""Headers of safetensors files, checked against the file's size before anything is mapped into memory.

Reads the first bytes of a file; writes nothing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from care_mla.errors import CheckpointError

WIDTHS = {
    1: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"),
    2: ("I16", "U16", "F16", "BF16"),
    4: ("I32", "U32", "F32"),
    8: ("I64", "U64", "F64"),
}
ITEM_BYTES = {dtype: width for width, dtypes in WIDTHS.items() for dtype in dtypes}
MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit


class StoredTensor(NamedTuple):
    """One tensor in a file: its dtype as safetensors spells it, its shape, and where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated, too long, or its header cannot be what it claims.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: missing file. The checkpoint is incomplete. Download it again.")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _corrupt(
                path, f"{size} bytes cannot hold a header of {length}; it is truncated or no safetensors file"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise _corrupt(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _entry(path, name, entry, start) for name, entry in header.items()}
    end = max((tensor.end for tensor in tensors.values()), default=start)
    if end != size:
        state = "truncated" if end > size else "too long"
        raise _corrupt(path, f"it is {state}: its header describes {end} bytes, the file has {size}")
    return tensors


def _entry(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = (start + offset for offset in entry["data_offsets"])
        stated = math.prod(shape) * ITEM_BYTES.get(dtype, 0)
    except (KeyError, TypeError, ValueError) as error:
        raise _corrupt(path, f"the header's entry for {name} is malformed ({entry!r:.80})") from error
    if not start <= begin <= end or (dtype in ITEM_BYTES and stated != end - begin):
        raise _corrupt(path, f"{name} ({dtype}, shape {list(shape)}) does not fit its {end - begin} bytes")
    return StoredTensor(dtype, shape, begin, end)


def _corrupt(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: corrupt file: {why}. No weight in it can be trusted. Download it again.")
