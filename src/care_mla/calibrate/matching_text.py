"""Text for block matching: that of the statistics, or more where more is asked for; never what is held out.

Writes `matching_….safetensors` in the work folder where the statistics' text does not suffice.
"""
# Shapes: B blocks, L positions, T tokens.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from care_mla.calibrate.data import SELF, CalibrationOptions, TokenBlocks, more_tokens
from care_mla.workspace import Workspace, fingerprint, save_tensors

if TYPE_CHECKING:
    from care_mla.checkpoint.source import Source

MATCHING_LENGTH = 512  # short blocks are joined up to here: what a conversion loses grows with length


def matching_blocks(
    source: Source,
    config: CalibrationOptions,
    workspace: Workspace,
    blocks: TokenBlocks,
    count: int,
    **lengths: Any,
) -> Tensor:
    """`count` tokens in blocks (B, L), made once and then read from the work folder.

    Args:
        blocks: of the statistics; the first to be taken.
        lengths: what `more_tokens` takes beside.

    Raises:
        CalibrationError: the text has fewer.
    """
    tokens_T = blocks.short_BL.flatten()
    if count > len(tokens_T):
        path = workspace.path(f"matching_{fingerprint([blocks.content_hash, count])}.safetensors")
        if not path.exists():
            # The model goes on writing; from a text, blocks are drawn from all over it.
            missing = count - len(tokens_T) if config.calibration == SELF else count
            save_tensors(path, {"tokens": more_tokens(source, config, missing, **lengths)})
        more_T = load_file(path)["tokens"]
        tokens_T = torch.cat((tokens_T, more_T)) if config.calibration == SELF else more_T
    length = min(MATCHING_LENGTH, source.facts.max_position_embeddings, count)
    tokens_T = tokens_T[:count]
    return tokens_T[: len(tokens_T) // length * length].view(-1, length)
