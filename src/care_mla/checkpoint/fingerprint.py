"""Hashes of large files that change when weights change, without reading all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

FULL_BYTES = 64 * 2**20  # files up to this size are hashed whole
SAMPLE_BYTES = 16 * 2**10


def file_digest(path: Path, data_start: int, regions: Iterable[tuple[int, int]]) -> str:
    """SHA-256 of a file: all of it when small, else its size, its header and three blocks of every tensor.

    Training or quantising a model changes every block of every matrix, so samples see it; a change of a few
    bytes in the middle of a large tensor goes unseen.

    Args:
        data_start: bytes of header, hashed whole.
        regions: (begin, end) of every tensor, in bytes from the start of the file.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}".encode())
    with path.open("rb") as file:
        if size <= FULL_BYTES:
            digest.update(file.read())
            return digest.hexdigest()
        digest.update(file.read(data_start))
        for begin, end in sorted(regions):
            for offset in (begin, (begin + end) // 2, max(begin, end - SAMPLE_BYTES)):
                file.seek(offset)
                digest.update(file.read(min(SAMPLE_BYTES, end - offset)))
    return digest.hexdigest()
