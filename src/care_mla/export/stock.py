"""The profiles `deepseek-v2` and `mistral4`: deepseek-v3's attention under other classes of transformers.

Read and write what deepseek.py does. Their routers take a softmax over experts, where V3's takes a sigmoid.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from care_mla import console
from care_mla.export.deepseek import check_deepseek, write_deepseek_checkpoint
from care_mla.factors import LatentLayer
from care_mla.facts import ModelFacts
from care_mla.profiles import profile_blocker
from care_mla.workspace import read_json, write_json

if TYPE_CHECKING:
    from care_mla.checkpoint.source import Source
    from care_mla.export.converted import ConvertedFolder


def _engine(facts: ModelFacts) -> str:
    """Whose DeepSeek-V2 must be exact: transformers', or vLLM's and SGLang's where its router is another."""
    return "vLLM" if facts.sparse_layers and facts.norm_topk_prob else "transformers"


def check_deepseek_v2(model: ConvertedFolder, dtype: torch.dtype) -> None:
    """Refuse what `DeepseekV2ForCausalLM` cannot express; warn where transformers runs it otherwise.

    Raises:
        ExportError: naming the feature.
    """
    facts = model.facts
    check_deepseek(facts, "decoupled", dtype=dtype, profile="deepseek-v2", engine=_engine(facts))
    if (blocker := profile_blocker(facts, "deepseek-v2")) is not None:
        console.current().warn(
            f"the result is another model in transformers ({blocker}). Use it in vLLM or SGLang alone; "
            "transformers runs --profile mistral4"
        )


def check_mistral4(model: ConvertedFolder, dtype: torch.dtype) -> None:
    """Refuse what `Mistral4ForCausalLM` cannot express.

    Raises:
        ExportError: naming the feature.
    """
    check_deepseek(model.facts, "decoupled", dtype=dtype, profile="mistral4")


def write_deepseek_v2_checkpoint(
    source: Source,
    layers: Callable[[int], LatentLayer],
    folder: Path,
    dtype: torch.dtype,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write a folder that stock transformers loads as `DeepseekV2ForCausalLM`; see deepseek.py."""
    engine = _engine(source.facts)
    summary = write_deepseek_checkpoint(
        source, layers, folder, dtype, advance, profile="deepseek-v2", engine=engine
    )
    config = read_json(folder / "config.json")
    # This class always takes RoPE's pairs from neighbours, and has no switch for it.
    del config["rope_interleave"]
    config |= {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"}
    write_json(folder / "config.json", config)
    return summary


def write_mistral4_checkpoint(
    source: Source,
    layers: Callable[[int], LatentLayer],
    folder: Path,
    dtype: torch.dtype,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write a folder that stock transformers loads as `Mistral4ForCausalLM`; see deepseek.py."""
    return write_deepseek_checkpoint(source, layers, folder, dtype, advance, profile="mistral4")
