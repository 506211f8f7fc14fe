"""A source model as transformers saves it: `config.json`, one or many safetensors files, a tokenizer."""

from __future__ import annotations

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from care_mla.checkpoint.fingerprint import file_digest
from care_mla.checkpoint.safetensors_header import StoredTensor, read_header
from care_mla.checkpoint.source import Source, TensorHeader
from care_mla.checkpoint.spelling import Part, parts_of, stored_name
from care_mla.errors import CareError, CheckpointError, UnsupportedModelError
from care_mla.facts import ModelFacts
from care_mla.families import facts_from_config
from care_mla.workspace import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Any one of these can define a tokenizer.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
SIDE_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "tokenization_*.py",  # a tokenizer that brings its own code
)
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


class FolderSource(Source):
    """A checkpoint folder. Files are memory-mapped, each when its first tensor is asked for.

    Args:
        name: as the user typed it.
        folder: holds `config.json`.
        trust_remote_code: whether the tokenizer may bring its own code.
    """

    def __init__(self, name: str, folder: Path, *, trust_remote_code: bool = False) -> None:
        self.name = name
        self.folder = folder
        self.trust_remote_code = trust_remote_code
        self.config = self._read_json("config.json")
        self.facts = self._facts()
        self._open_files: dict[Path, Any] = {}
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        if pickles and not any(folder.glob("*.safetensors*")):
            raise CheckpointError(
                f"{folder}: its weights are pickle files ({pickles[0]}), which can run any code when they "
                "are loaded, so they are never read. Convert them once: load with transformers and "
                "save_pretrained(FOLDER)."
            )

    def _facts(self) -> ModelFacts:
        return facts_from_config(self.config)

    def _read_json(self, file: str) -> dict[str, Any]:
        path = self.folder / file
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{path}: missing file. {self.name} is no transformers checkpoint without it. Name the "
                "folder that holds config.json and *.safetensors, or a .gguf file."
            ) from error
        except ValueError as error:
            raise CheckpointError(f"{path}: not JSON ({error}). Correct it, or download it again.") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}: holds no JSON object. Correct it, or download it again.")
        return value

    @cached_property
    def _weight_map(self) -> dict[str, str] | None:
        """Tensor names to file names from the index; None for a checkpoint in one file."""
        if not (self.folder / INDEX).is_file():
            return None
        weight_map = self._read_json(INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{self.folder / INDEX}: no weight_map. Download it again.")
        return weight_map

    @cached_property
    def files(self) -> list[Path]:
        """The safetensors files, in the order of their names."""
        if self._weight_map is not None:
            return [self.folder / file for file in sorted(set(self._weight_map.values()))]
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE]
        found = sorted(self.folder.glob("*.safetensors"))
        if len(found) == 1:
            return found
        if not found:
            raise CheckpointError(
                f"{self.folder}: no *.safetensors file. There are no weights to convert. Name a folder that "
                "has them, or download the checkpoint again."
            )
        raise CheckpointError(
            f"{self.folder}: {len(found)} safetensors files ({found[0].name}, …) but no {INDEX}, so nobody "
            "knows whether they are complete. Download the checkpoint again."
        )

    @cached_property
    def _stored(self) -> dict[str, tuple[Path, StoredTensor]]:
        """Every tensor with the file that holds it, checked against the index."""
        stored: dict[str, tuple[Path, StoredTensor]] = {}
        for path in self.files:
            for name, tensor in read_header(path).items():
                if name in stored:
                    raise CheckpointError(
                        f"{path}: {name} is in {stored[name][0].name} too. Download it again."
                    )
                stored[name] = (path, tensor)
        for name, file in (self._weight_map or {}).items():
            if name not in stored or stored[name][0].name != file:
                raise CheckpointError(
                    f"{self.folder / INDEX}: says that {name} is in {file}, and it is not. The files are "
                    "from different checkpoints. Download them again."
                )
        return stored

    @cached_property
    def _parts(self) -> dict[str, Part]:
        """Where each tensor lies, by its standard name."""
        parts: dict[str, Part] = {}
        for stored, (path, tensor) in self._stored.items():
            for part in parts_of(stored, tensor.shape, self.facts):
                if part.name in parts:
                    raise CheckpointError(
                        f"{path}: {part.name} is there twice, in {parts[part.name].stored} and in {stored}. "
                        "One of the two is wrong. Download the checkpoint again."
                    )
                parts[part.name] = part
        return parts

    def stored_name(self, name: str) -> str:
        return stored_name(name, self.facts)

    @cached_property
    def headers(self) -> dict[str, TensorHeader]:
        headers = {}
        for name, part in self._parts.items():
            path, tensor = self._stored[part.stored]
            if tensor.dtype not in DTYPES:
                raise UnsupportedModelError(
                    f"{path}: {part.stored} is stored as {tensor.dtype}. Quantised weights cannot be "
                    "converted. Use the checkpoint in bfloat16, float16 or float32."
                )
            headers[name] = TensorHeader(part.shape, DTYPES[tensor.dtype])
        return headers

    def _read(self, name: str) -> Tensor:
        part = self._parts[name]
        path, _ = self._stored[part.stored]
        if path not in self._open_files:
            self._open_files[path] = safe_open(path, framework="pt")
        file = self._open_files[path]
        if part.rows is None:
            return file.get_tensor(part.stored)
        return file.get_slice(part.stored)[part.rows]

    def fingerprint(self) -> str:
        by_file: dict[Path, list[tuple[int, int]]] = {path: [] for path in self.files}
        for path, tensor in self._stored.values():
            by_file[path].append((tensor.begin, tensor.end))
        digests = {}
        for path, regions in by_file.items():
            digests[path.name] = file_digest(path, min((begin for begin, _ in regions), default=8), regions)
        return fingerprint({"config": self.config, "files": digests})

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return read_tokenizer(self.name, self.folder, trust_remote_code=self.trust_remote_code)

    def save_side_files(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in (*SIDE_FILES, *LICENCES):
            for path in sorted(self.folder.glob(pattern)):
                shutil.copyfile(path, folder / path.name)
        if (templates := self.folder / "additional_chat_templates").is_dir():
            shutil.copytree(templates, folder / templates.name, dirs_exist_ok=True)
        if not (folder / "generation_config.json").exists():
            self._save_generation_config(folder)


def read_tokenizer(name: str, folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder; `name` is how messages call the model.

    Raises:
        CareError: there is none, or it cannot be loaded.
    """
    if not any((folder / file).is_file() for file in VOCABULARIES):
        raise CareError(
            f"{name}: no tokenizer in the folder ({', '.join(VOCABULARIES)}), and text cannot be "
            f"read without. Copy the original model's tokenizer files into {folder}."
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise CareError(
            f"{name}: its tokenizer cannot be loaded ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0]}). Text cannot be read without. Install what it names, "
            "or add --trust-remote-code if you trust the model's own code."
        ) from error
    assert tokenizer is not None
    return tokenizer
