"""What later models are compared with: the original's predictions on every text, kept while it is not loaded.

Kept are the hidden states before its head, on disk, and the head itself, in memory. Log-probabilities over
150,000 tokens would take 600 kB for each position, 170 GB for WikiText-2's test split; states of width D take
4 D bytes, 2 GB at D = 2,048, and the head makes the same numbers of them again for 2 S D multiplications per
position, a small part of what the whole model costs.
"""
# Shapes: B blocks, T predicted tokens of a block, D hidden_size, S vocabulary.

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from care_mla.errors import OptionError


@dataclass(frozen=True)
class OriginalStates:
    """The original's states on one text and its head.

    Attributes:
        tokens_BL: the token ids that the states belong to.
        states_BTD: float32, mapped from a file.
    """

    head: nn.Linear
    tokens_BL: Tensor
    states_BTD: Tensor

    def comparable(self, head: nn.Linear, tokens_BL: Tensor) -> bool:
        """Whether a model reads the same ids and predicts over as large a vocabulary."""
        return head.out_features == self.head.out_features and torch.equal(tokens_BL, self.tokens_BL)


def room_for_states(path: Path, head: nn.Linear, tokens_BL: Tensor) -> OriginalStates:
    """A file for the states of all blocks, to be filled block by block.

    Raises:
        OptionError: the disk has no room for it.
    """
    blocks, length = tokens_BL.shape
    shape = (blocks, length - 1, head.in_features)
    count = torch.Size(shape).numel()
    free = shutil.disk_usage(path.parent).free
    if 4 * count > free:
        raise OptionError(
            f"{path.parent}: {4 * count / 2**30:.1f} GiB are needed for the original's hidden "
            f"states, and {free / 2**30:.1f} GiB are free. Take fewer tokens (--max-tokens N), or name "
            "another folder for temporary files: TMPDIR=FOLDER care evaluate …"
        )
    states_X = torch.from_file(str(path), shared=True, size=count, dtype=torch.float32)
    return OriginalStates(head, tokens_BL, states_X.view(shape))
