"""The work folder: atomic files, fingerprints, and what is already done.

A file here is either absent or complete: it is written under a temporary name and renamed. Each step has a
stamp `<step>.json` with the fingerprint of everything that its result depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from care_mla.errors import ResumeError

if TYPE_CHECKING:
    from torch import Tensor

# Raised when a version of care gives files in a work folder another meaning; older ones are then not reused.
SCHEMA = 2


def fingerprint(value: Any) -> str:
    """A short hash of anything that JSON can hold, and of SCHEMA; equal on every machine."""
    return hashlib.sha256(json.dumps([SCHEMA, value], sort_keys=True).encode()).hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def layer_file(layer_idx: int) -> str:
    """File name of one layer's results."""
    return f"layer_{layer_idx:03}.safetensors"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata)
    os.replace(temporary, path)


class Workspace:
    """A work folder whose steps are stamped with the fingerprint of what they depend on.

    Args:
        folder: created when the first file is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, *parts: str) -> Path:
        """The path of a file in the work folder."""
        return self.folder.joinpath(*parts)

    def claim(self, step: str, depends_on: Mapping[str, Any]) -> None:
        """Stamp a step before its first file is written, or check that the stamp there is the same.

        Raises:
            ResumeError: the folder holds this step's results for something else; the message names what
                differs.
        """
        stamp = self.path(f"{step}.stamp.json")
        wanted = json.loads(json.dumps({"format of the work folder": SCHEMA, **depends_on}))
        if not stamp.exists():
            write_json(stamp, wanted)
            return
        found = json.loads(stamp.read_text(encoding="utf-8"))
        if found == wanted:
            return
        differing = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        details = "; ".join(f"{key} was {found.get(key)!r}, now {wanted.get(key)!r}" for key in differing)
        raise ResumeError(
            f"{self.folder}: its {step} results belong to another run ({details}). Nothing was changed. "
            f"Choose another folder with --work FOLDER, or remove this one: rm -r {self.folder}"
        )

    def release(self, step: str) -> None:
        """Remove a step's stamp, once its results no longer depend on it."""
        self.path(f"{step}.stamp.json").unlink(missing_ok=True)

    def clear(self, name: str) -> None:
        """Remove a folder of intermediate files that is no longer needed."""
        shutil.rmtree(self.path(name), ignore_errors=True)
