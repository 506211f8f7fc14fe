"""Tokens to heal on: sampled from the teacher, or text, in packed blocks; part of them held out.

Writes `data/` in the work folder: one safetensors file per text, and the parts of a sampling as they come.
Each is named by what it depends on, so that another run takes it from there, and may be given as `--data`.
"""
# Shapes: B blocks, L positions, T tokens of a text.

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from care_mla import console as terminal
from care_mla.calibrate.sample import TEMPERATURE, sample_sequences
from care_mla.calibrate.text import read_text
from care_mla.errors import CalibrationError
from care_mla.heal_config import SELF
from care_mla.plan import SAMPLING_CACHE_BYTES
from care_mla.workspace import Workspace, fingerprint, save_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from care_mla.checkpoint.source import Source

TOKENS = "tokens_BL"


@dataclass(frozen=True)
class Corpus:
    """One text as blocks of ids on the CPU, with its share of what is trained on."""

    name: str
    share: float
    train_BL: Tensor
    held_out_BL: Tensor


class Blocks:
    """The order in which blocks of all texts are trained on: a function of the seed and of the place alone.

    A round has as many blocks as all texts together, a share of them from each text, shuffled. Within a text
    no block comes again before all have come.

    Args:
        corpora: of one block length.
    """

    def __init__(self, corpora: list[Corpus], seed: int) -> None:
        self.corpora, self.seed = corpora, seed
        total = sum(len(corpus.train_BL) for corpus in corpora)
        self.quotas = [max(1, round(total * corpus.share)) for corpus in corpora]
        self._round: tuple[int, list[tuple[int, int]]] = (-1, [])

    def __getitem__(self, place: int) -> Tensor:
        """The block at a 0-based place in an endless order: (L,)."""
        round_idx, within = divmod(place, sum(self.quotas))
        if self._round[0] != round_idx:
            self._round = round_idx, self._order(round_idx)
        corpus_idx, block_idx = self._round[1][within]
        return self.corpora[corpus_idx].train_BL[block_idx]

    def batch(self, first: int, count: int) -> Tensor:
        """The blocks at `count` places: (count, L), int64."""
        return torch.stack([self[first + i] for i in range(count)]).long()

    def _order(self, round_idx: int) -> list[tuple[int, int]]:
        pairs: list[tuple[int, int]] = []
        for corpus_idx, (corpus, quota) in enumerate(zip(self.corpora, self.quotas, strict=True)):
            size = len(corpus.train_BL)
            first = round_idx * quota
            epochs = range(first // size, (first + quota - 1) // size + 1)
            order = torch.cat([_permutation(size, self.seed, 1 + corpus_idx, epoch) for epoch in epochs])
            start = first - epochs[0] * size
            pairs += [(corpus_idx, i) for i in order[start : start + quota].tolist()]
        return [pairs[i] for i in _permutation(len(pairs), self.seed, 0, round_idx).tolist()]

    @property
    def held_out_BL(self) -> Tensor:
        """Every block that is measured and never trained on."""
        return torch.cat([corpus.held_out_BL for corpus in self.corpora]).long()

    @property
    def content_hash(self) -> str:
        """Of all ids, shares and the held-out part."""
        digest = hashlib.sha256()
        for corpus in self.corpora:
            digest.update(f"{corpus.name} {corpus.share:.12g} {tuple(corpus.train_BL.shape)}".encode())
            for tokens_BL in (corpus.train_BL, corpus.held_out_BL):
                digest.update(tokens_BL.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def _permutation(size: int, *key: int) -> Tensor:
    seed = int(hashlib.sha256(repr(key).encode()).hexdigest()[:15], 16)
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def split_corpus(name: str, share: float, blocks_BL: Tensor, held_out: int, seed: int) -> Corpus:
    """Hold out blocks from all over a text, in the same places whatever else is trained on.

    Args:
        held_out: blocks wanted; a tenth of the text at most, and one at least.

    Raises:
        CalibrationError: there are fewer than two blocks.
    """
    count, length = blocks_BL.shape
    if count < 2:
        raise CalibrationError(
            f"--data {name} has {count} block of {length} tokens, and two are needed: one to train on, one "
            f"to measure on. Nothing was written. Give more text, or --sequence-length {max(2, length // 4)}"
        )
    order = _permutation(count, seed, -1)
    kept = max(1, min(held_out, count // 10))
    return Corpus(name, share, blocks_BL[order[kept:].sort().values], blocks_BL[order[:kept].sort().values])


def text_blocks(source: Source, name: str, *, tokens: int, length: int) -> Tensor:
    """Packed blocks (B, L) of a text, or of a file of blocks that an earlier run sampled.

    Raises:
        CalibrationError: the text cannot be read, or its tokens are not the model's.
    """
    if name.endswith(".safetensors"):
        return _stored_blocks(Path(name), source, tokens=tokens, length=length)
    try:
        text = read_text(name, tokens=tokens)
    except CalibrationError as error:
        # The texts of calibration and of healing are read by one function, under two names.
        raise CalibrationError(str(error).replace("--calibration", "--data")) from error
    ids = source.tokenizer()(text.text, add_special_tokens=False, verbose=False)["input_ids"]
    if ids and max(ids) >= source.facts.vocab_size:
        raise CalibrationError(
            f"{source.name}: its tokenizer gives token {max(ids)}, but the model has "
            f"{source.facts.vocab_size} (vocab_size). Tokenizer and weights do not belong together: download "
            "the model again."
        )
    tokens_T = torch.tensor(ids, dtype=torch.int32)
    return tokens_T[: len(tokens_T) // length * length].view(-1, length)[: max(2, tokens // length)]


def _stored_blocks(path: Path, source: Source, *, tokens: int, length: int) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            blocks_BL = file.get_tensor(TOKENS)
    except SafetensorError as error:
        raise CalibrationError(
            f"--data {path} holds no tokens that care heal sampled ({error}). Nothing was written. Give "
            "another text, or sample it again: --data self"
        ) from error
    if int(blocks_BL.max()) >= source.facts.vocab_size:
        raise CalibrationError(
            f"--data {path} holds token {int(blocks_BL.max())}, and {source.name} has "
            f"{source.facts.vocab_size} (vocab_size): another model wrote it. Nothing was written."
        )
    tokens_T = blocks_BL.flatten().int()
    return tokens_T[: len(tokens_T) // length * length].view(-1, length)[: max(2, tokens // length)]


class Sampling:
    """Text that the teacher writes itself, in parts, each of which is a file once it is complete.

    Args:
        source: the teacher.
        workspace: where the parts and the result go.
        sequences: how many; likewise `length` of each, in tokens.
        itemsize: bytes of a cached value.
    """

    def __init__(
        self, source: Source, workspace: Workspace, *, sequences: int, length: int, seed: int, itemsize: int
    ) -> None:
        self.source, self.workspace = source, workspace
        self.sequences, self.length, self.seed = sequences, length, seed
        facts = source.facts
        cache_bytes = length * facts.num_hidden_layers * facts.cached_values * itemsize
        self.batch = max(1, min(sequences, SAMPLING_CACHE_BYTES // cache_bytes, 256))
        key = fingerprint([source.fingerprint(), sequences, length, seed, TEMPERATURE])
        self.path = workspace.path("data", f"self-{key}.safetensors")
        self.part_folder = f"self-{key}"
        self.starts = range(0, sequences, self.batch)

    def write_parts(self, model: PreTrainedModel, start_token: int, rank: int, ranks: int) -> None:
        """Sample the parts that are missing and that fall to this process."""
        missing = [s for s in self.starts if not self._part(s).exists()] if not self.path.exists() else []
        mine = missing[rank::ranks]
        title = f"The teacher writes {self.sequences * self.length:,} tokens"
        with terminal.current().progress(title, len(mine) * (self.length - 1)) as progress:
            for start in mine:
                blocks_BL = sample_sequences(
                    model,
                    start_token=start_token,
                    num_sequences=min(self.batch, self.sequences - start),
                    length=self.length,
                    seed=self.seed,
                    first_sequence=start,
                    advance=progress.advance,
                )
                save_tensors(self._part(start), {TOKENS: blocks_BL.int()})

    def join(self) -> None:
        """Make one file of all parts."""
        if not self.path.exists():
            parts = [self._read(self._part(start)) for start in self.starts]
            save_tensors(self.path, {TOKENS: torch.cat(parts)})
        self.workspace.clear(f"data/{self.part_folder}")

    def blocks(self) -> Tensor:
        """The sampled sequences (B, L)."""
        return self._read(self.path)

    def _part(self, start: int) -> Path:
        return self.workspace.path("data", self.part_folder, f"from_{start:08}.safetensors")

    @staticmethod
    def _read(path: Path) -> Tensor:
        with safe_open(path, "pt") as file:
            return file.get_tensor(TOKENS)


def start_token(source: Source) -> int:
    """The token that a text starts from: bos, or the end-of-text token before it; 0 if neither is named."""
    for key in ("bos_token_id", "eos_token_id"):
        value = source.facts.config.get(key)
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int):
            return first
    return 0


def load_corpora(
    source: Source,
    sources: list[tuple[str, float]],
    sampled: Callable[[], Tensor],
    *,
    tokens: int,
    length: int,
    held_out_tokens: int,
    seed: int,
) -> list[Corpus]:
    """Every text in blocks of `length`, split.

    Args:
        sources: texts with their shares (`HealConfig.sources`).
        sampled: gives what the teacher wrote.
        tokens: to take from each text.
        held_out_tokens: in all, spread as the shares say.
    """
    corpora = []
    for name, share in sources:
        blocks_BL = sampled() if name == SELF else text_blocks(source, name, tokens=tokens, length=length)
        label = name if name == SELF else Path(name).name
        held_out = round(held_out_tokens * share / length)
        corpora.append(split_corpus(label, share, blocks_BL, held_out, seed))
    return corpora
