"""Blocks of tokens to heal on, part of them held out, and the order in which they are trained on.

Blocks lie in files (texts.py) and are mapped into memory; nothing here holds a text as a whole.
"""
# Shapes: B blocks, L positions, I numbers of blocks.

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from care_mla.errors import CalibrationError


@dataclass(frozen=True)
class Corpus:
    """One text as blocks of ids on the CPU, with its share of what is trained on.

    Attributes:
        train_I: the blocks to train on.
        held_out_I: the blocks that are measured and never trained on.
    """

    name: str
    share: float
    blocks_BL: Tensor
    train_I: Tensor
    held_out_I: Tensor

    def as_json(self) -> dict[str, object]:
        """What of it is told in JSON: its name and its numbers of tokens."""
        length = self.blocks_BL.shape[1]
        tokens = {"tokens": len(self.train_I) * length, "held_out": len(self.held_out_I) * length}
        return {"name": self.name, "share": self.share, **tokens}


def split_corpus(name: str, share: float, blocks_BL: Tensor, held_out: int, seed: int) -> Corpus:
    """Hold out blocks from all over a text, the same ones whatever else is trained on.

    Args:
        held_out: blocks wanted; a tenth of the text at most, and one at least.

    Raises:
        CalibrationError: there are fewer than two blocks.
    """
    count, length = blocks_BL.shape
    if count < 2:
        raise CalibrationError(
            f"--data {name} has {'one block' if count else 'no block'} of {length} tokens, and two are "
            "needed: one to train on, one to measure on. Nothing was written. Give more text, or a smaller "
            f"--sequence-length, such as {max(2, length // 4)}"
        )
    order_I = _permutation(count, seed, -1)
    kept = max(1, min(held_out, count // 10))
    return Corpus(name, share, blocks_BL, order_I[kept:].sort().values, order_I[:kept].sort().values)


class Blocks:
    """The order in which blocks of all texts are trained on: a function of the seed and of the place alone.

    A round has as many blocks as all texts together, a share of them from each text, shuffled. Within a text
    no block comes again before all have come.

    Args:
        corpora: of one block length.
    """

    def __init__(self, corpora: list[Corpus], seed: int) -> None:
        self.corpora, self.seed = corpora, seed
        self.length = corpora[0].blocks_BL.shape[1]
        total = sum(len(corpus.train_I) for corpus in corpora)
        self.quotas = [max(1, round(total * corpus.share)) for corpus in corpora]
        self._round: tuple[int, list[tuple[int, int]]] = (-1, [])

    def __getitem__(self, place: int) -> Tensor:
        """The block at a 0-based place in an endless order: (L,)."""
        round_idx, within = divmod(place, sum(self.quotas))
        if self._round[0] != round_idx:
            self._round = round_idx, self._order(round_idx)
        corpus_idx, block_idx = self._round[1][within]
        return self.corpora[corpus_idx].blocks_BL[block_idx]

    def batch(self, first: int, count: int) -> Tensor:
        """The blocks at `count` places: (count, L), int64."""
        return torch.stack([self[first + i] for i in range(count)]).long()

    def _order(self, round_idx: int) -> list[tuple[int, int]]:
        pairs: list[tuple[int, int]] = []
        for corpus_idx, (corpus, quota) in enumerate(zip(self.corpora, self.quotas, strict=True)):
            size = len(corpus.train_I)
            first = round_idx * quota
            epochs = range(first // size, (first + quota - 1) // size + 1)
            order = torch.cat([_permutation(size, self.seed, 1 + corpus_idx, epoch) for epoch in epochs])
            start = first - epochs[0] * size
            numbers_I = corpus.train_I[order[start : start + quota]]
            pairs += [(corpus_idx, block_idx) for block_idx in numbers_I.tolist()]
        return [pairs[i] for i in _permutation(len(pairs), self.seed, 0, round_idx).tolist()]

    @property
    def held_out_BL(self) -> Tensor:
        """Every block that is measured and never trained on, int64."""
        return torch.cat([corpus.blocks_BL[corpus.held_out_I] for corpus in self.corpora]).long()

    @property
    def content_hash(self) -> str:
        """Of all ids, of their split, and of the shares."""
        digest = hashlib.sha256()
        for corpus in self.corpora:
            digest.update(f"{corpus.name} {corpus.share:.12g} {tuple(corpus.blocks_BL.shape)}".encode())
            for tensor in (corpus.blocks_BL, corpus.held_out_I):
                digest.update(tensor.contiguous().view(-1).numpy().data)
        return digest.hexdigest()[:16]


def _permutation(size: int, *key: int) -> Tensor:
    seed = int(hashlib.sha256(repr(key).encode()).hexdigest()[:15], 16)
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))
