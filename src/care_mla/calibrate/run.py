"""Calibration from beginning to end: tokens, gamma, then the statistics of every layer. Resumes where it was.

Writes `tokens.safetensors`, `rotation/` and `statistics/` in the work folder; a folder that holds them for
the same model, text and options is taken as it is, for any method and budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from care_mla.calibrate.data import SELF, TokenBlocks, prepare_tokens, too_large_to_write
from care_mla.calibrate.layers import LayerStack
from care_mla.calibrate.matching_text import matching_blocks
from care_mla.calibrate.stream import collect_rotation, collect_statistics, whole_micro_batches
from care_mla.matching_plan import matching_tokens
from care_mla.plan import machine_memory, parameter_count, resolve_calibration, rotation_length, spool
from care_mla.workspace import Workspace

if TYPE_CHECKING:
    from care_mla.checkpoint.source import Source
    from care_mla.configs import CalibrationConfig, PlanConfig
    from care_mla.console import Console

# The whole model in float32, with what sampling caches, must leave room for the rest of the machine.
WHOLE_MODEL_SHARE = 0.7


def whole_model_fits(source: Source, device: torch.device) -> bool:
    """Whether all of the source's weights can be held in float32."""
    return 4 * parameter_count(source.facts) < WHOLE_MODEL_SHARE * _memory(device)


def check_calibration(source: Source, config: CalibrationConfig, device: torch.device) -> None:
    """Refuse before any work what `calibrate` would refuse after reading all weights.

    Raises:
        CalibrationError: the model is to write its own text, and does not fit.
        OptionError: tokens and lengths contradict the model or each other.
    """
    resolve_calibration(source.facts, config, device=device.type)
    if config.calibration == SELF and not whole_model_fits(source, device):
        raise too_large_to_write(source)


def _memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else machine_memory()


def calibrate(
    stack: LayerStack, config: CalibrationConfig, workspace: Workspace, console: Console
) -> TokenBlocks:
    """Collect, or find in the work folder, everything that the methods need.

    Raises:
        CalibrationError: the text cannot be read or is too short, or the model is too large to write it.
        ResumeError: the work folder belongs to other data, another model or other options.
    """
    source, device = stack.source, stack.device
    tokens, length = resolve_calibration(source.facts, config, device=device.type)
    blocks = prepare_tokens(
        source,
        config,
        workspace,
        tokens=tokens,
        sequence_length=length,
        rotation_length=rotation_length(source.facts, _memory(device)),
        device=device,
        console=console,
        whole_model_fits=whole_model_fits(source, device),
    )
    spooled = spool(source.facts, tokens=tokens, sequence_length=length, max_spool_gib=config.max_spool_gib)
    workspace.claim(
        "statistics", {"tokens": blocks.content_hash, "model": source.fingerprint(), "seed": config.seed}
    )
    layers = stack.num_layers
    chunks = -(-len(blocks.short_BL) // whole_micro_batches(spooled.chunk_sequences, length))
    with console.progress("Rotation that each head sees (gamma)", layers) as progress:
        collect_rotation(stack, blocks.long_BL, workspace, progress.advance)
    with console.progress("Statistics, forward and backward", 2 * layers * chunks) as progress:
        collect_statistics(
            stack,
            blocks.short_BL,
            workspace,
            seed=config.seed,
            chunk_blocks=spooled.chunk_sequences,
            advance=progress.advance,
        )
    return blocks


def matching_text(
    stack: LayerStack, config: PlanConfig, blocks: TokenBlocks, workspace: Workspace, console: Console
) -> Tensor:
    """Token ids for block matching, (B, L).

    Raises:
        CalibrationError: --match-tokens asks for more than the text has.
    """
    source, device = stack.source, stack.device
    tokens, length = resolve_calibration(source.facts, config, device=device.type)
    return matching_blocks(
        source,
        config,
        workspace,
        blocks,
        matching_tokens(config, tokens),
        tokens=tokens,
        sequence_length=length,
        rotation_length=rotation_length(source.facts, _memory(device)),
        device=device,
        console=console,
    )
