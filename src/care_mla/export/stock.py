"""The profile `deepseek-v2`: deepseek-v3's tensors under another class of transformers.

Reads and writes what deepseek.py does; only `config.json` differs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from care_mla.export.deepseek import check_deepseek, write_deepseek_checkpoint
from care_mla.factors import LatentLayer
from care_mla.workspace import read_json, write_json

if TYPE_CHECKING:
    from care_mla.checkpoint.source import Source
    from care_mla.export.converted import ConvertedFolder


def check_deepseek_v2(model: ConvertedFolder, dtype: torch.dtype) -> None:
    """Refuse what `DeepseekV2ForCausalLM` cannot express.

    Raises:
        ExportError: naming the feature.
    """
    check_deepseek(model.facts, "decoupled", dtype=dtype)


def write_deepseek_v2_checkpoint(
    source: Source,
    layers: Callable[[int], LatentLayer],
    folder: Path,
    dtype: torch.dtype,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write a folder that stock transformers loads as `DeepseekV2ForCausalLM`; see deepseek.py."""
    summary = write_deepseek_checkpoint(source, layers, folder, dtype, advance)
    config = read_json(folder / "config.json")
    # This class always takes RoPE's pairs from neighbours, and has no switch for it.
    del config["rope_interleave"]
    config |= {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"}
    write_json(folder / "config.json", config)
    return summary
