"""A source model on disk, read tensor by tensor, whatever its format.

Reads the configuration on opening, headers when they are first needed, and weights only by name. Writes
nothing but the side files (tokenizer, generation settings, licence) that `save_side_files` copies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from care_mla.errors import CheckpointError
from care_mla.facts import ModelFacts
from care_mla.families import layer_weight_names, weight_names
from care_mla.workspace import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Buffers that old checkpoints carry and that follow from the configuration.
IGNORED_SUFFIX = "rotary_emb.inv_freq"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class TensorHeader(NamedTuple):
    """What is known about a tensor before it is read. `dtype` is that of `Source.tensor`."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Source(ABC):
    """A source model under standard tensor names. Nothing is read before it is needed.

    The names are Llama's, whatever the files say (`families.weight_names`): fused projections are split, and
    experts are a tensor each.

    Attributes:
        name: as the user typed it.
        facts: dimensions and switches, from the configuration alone.
    """

    name: str
    facts: ModelFacts

    @cached_property
    @abstractmethod
    def headers(self) -> dict[str, TensorHeader]:
        """Every tensor in the files, extra ones too, by its standard name.

        Raises:
            CheckpointError: a file is missing, truncated or corrupt.
        """

    @abstractmethod
    def _read(self, name: str) -> Tensor:
        """A tensor of `headers`, on the CPU."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of configuration and weights, the same wherever the files lie."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, as a transformers object.

        Raises:
            CareError: the model comes without one, or it cannot be built.
        """

    @abstractmethod
    def save_side_files(self, folder: Path) -> None:
        """Put the source's tokenizer, `generation_config.json` and licence into a folder."""

    def stored_name(self, name: str) -> str:
        """What the file calls the tensor that holds this one, for messages."""
        return name

    def names(self) -> list[str]:
        """Names of the model's tensors in the files, in model order; a tied head is not among them."""
        return [name for name in weight_names(self.facts) if name in self.headers]

    def ignored(self) -> list[str]:
        """Redundant tensors in the files: RoPE buffers, and the head where it is tied to the embedding."""
        tied = {HEAD} if self.facts.tie_word_embeddings else set()
        return [name for name in self.headers if name.endswith(IGNORED_SUFFIX) or name in tied]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._header(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that `tensor` returns for this name, without reading it."""
        return self._header(name).dtype

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU, in the stored dtype (float32 where a GGUF file is dequantised)."""
        self._header(name)
        return self._read(name)

    def layer(self, layer_idx: int) -> dict[str, Tensor]:
        """All tensors of one layer, under names relative to `model.layers.{layer_idx}.`."""
        prefix = f"model.layers.{layer_idx}."
        return {name: self.tensor(prefix + name) for name in layer_weight_names(self.facts, layer_idx)}

    @property
    def nbytes(self) -> int:
        """Bytes of all the model's tensors, as `tensor` returns them."""
        return sum(self.headers[name].nbytes for name in self.names())

    def check(self) -> None:
        """Check, on headers alone, that every tensor of the architecture is there in its shape, and no other.

        Raises:
            CheckpointError: naming the file or the tensors.
        """
        expected, found = weight_names(self.facts), self.headers
        missing = dict.fromkeys(self.stored_name(name) for name in expected if name not in found)
        if missing:
            raise CheckpointError(
                f"{self.name}: missing tensor{_some(missing)}. A {self.facts.architecture} cannot run "
                "without. Download the checkpoint again, or correct config.json."
            )
        ignored = self.ignored()
        if extra := [name for name in found if name not in expected and name not in ignored]:
            raise CheckpointError(
                f"{self.name}: unknown tensor{_some(extra)}. A {self.facts.architecture} with this "
                "config.json has no such weight, and dropping it would change the model. Use a checkpoint "
                "of the plain architecture."
            )
        shapes = expected | {HEAD: expected[EMBEDDING]}
        for name, header in found.items():
            if name in shapes and header.shape != shapes[name]:
                raise CheckpointError(
                    f"{self.name}: {self.stored_name(name)} has shape {list(header.shape)}, and "
                    f"config.json asks for {list(shapes[name])}. Correct config.json, or download the "
                    "checkpoint again."
                )

    def check_values(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every tensor once and check that it is finite, and that a tied head equals the embedding.

        Args:
            progress: called with the number of tensors checked and their total.

        Raises:
            CheckpointError: naming the tensor.
        """
        names = self.names()
        for done, name in enumerate(names, start=1):
            self._check_finite(name)
            if progress is not None:
                progress(done, len(names))
        if HEAD in self.ignored() and not torch.equal(self.tensor(HEAD), self.tensor(EMBEDDING)):
            raise CheckpointError(
                f"{self.name}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}. One of the "
                "two is wrong. Set tie_word_embeddings to false in config.json to keep both."
            )

    def _check_finite(self, name: str) -> None:
        tensor = self.tensor(name)
        # One pass without a mask as large as the tensor: both bounds are NaN if any value is.
        if tensor.numel() == 0 or all(bound.isfinite() for bound in tensor.aminmax()):
            return
        kind, count = ("NaN", tensor.isnan().sum()) if tensor.isnan().any() else ("Inf", tensor.isinf().sum())
        raise CheckpointError(
            f"{self.name}: {name} holds {int(count)} {kind} of {tensor.numel()} values. Every result would "
            f"be {kind}. Download the checkpoint again, or choose another one."
        )

    def _header(self, name: str) -> TensorHeader:
        header = self.headers.get(name)
        if header is None:
            raise CheckpointError(
                f"{self.name}: no tensor {name!r}. Check the checkpoint: care inspect {self.name}"
            )
        return header

    def _save_generation_config(self, folder: Path) -> None:
        """Build `generation_config.json` from the configuration's special tokens, for sources without one."""
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        values: dict[str, Any] = {
            key: self.facts.config[key] for key in keys if self.facts.config.get(key) is not None
        }
        write_json(folder / "generation_config.json", {"_from_model_config": True, **values})


def _some(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(names[:3])
    return (
        f" {shown}"
        if len(names) == 1
        else f"s {shown}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    )
