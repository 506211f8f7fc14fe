"""GGUF files written again with something changed, for the tests that wrong files fail."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# Changes tensors and metadata in place.
Change = Callable[[dict[str, np.ndarray], dict[str, Any]], None]


def rewrite(file: Path, change: Change) -> None:
    """Write a float32 file again with other tensors or metadata."""
    reader = gguf.GGUFReader(file)
    tensors = {t.name: np.array(t.data, dtype=np.float32) for t in reader.tensors}
    keys = {
        key: field.contents()
        for key, field in reader.fields.items()
        if key.startswith(("deepseek2.", "tokenizer."))
    }
    change(tensors, keys)
    changed = file.with_name("changed.gguf")
    writer = gguf.GGUFWriter(changed, "deepseek2")
    for key, value in keys.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(changed, file)
