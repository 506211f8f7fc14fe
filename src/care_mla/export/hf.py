"""The `care` profile: a checkpoint of our own transformers class, with the class's code inside.

Reads a source checkpoint tensor by tensor and one factored layer at a time; writes a folder that
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads without care_mla installed.
"""
# Shapes: D hidden_size, O columns of o_proj (N*H).

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from care_mla.checkpoint.spelling import module_tensors
from care_mla.checkpoint.writer import ShardWriter
from care_mla.factors import LatentLayer
from care_mla.families import layer_weight_names
from care_mla.mla.mapping import LatentDims, attention_state_dict, class_names, latent_config

if TYPE_CHECKING:
    from care_mla.checkpoint.source import Source


CODE = Path(__file__).parent.parent / "mla"
CODE_FILES = ("configuration.py", "latent_attention.py", "modeling.py")


def holds_our_code(folder: Path) -> bool:
    """Whether a folder's remote code is this version's own, to the byte, and nothing else is named to run."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    modules = {str(name).partition(".")[0] for name in config.get("auto_map", {}).values()}
    return modules == {"configuration", "modeling"} and all(
        (folder / name).is_file() and (folder / name).read_bytes() == (CODE / name).read_bytes()
        for name in CODE_FILES
    )


def write_latent_checkpoint(
    source: Source,
    layers: Callable[[int], LatentLayer],
    folder: Path,
    dtype: torch.dtype,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write the source with its attention replaced; one layer and one shard are in memory at a time.

    Args:
        source: checked (`Source.check`), so that it has no tensor that would be lost; every tensor
            outside attention passes through.
        layers: gives the factored layer of a 0-based index.
        folder: created; the caller makes the whole folder atomic.
        dtype: of all weights; the RoPE frequencies stay in float32.

    Raises:
        UnsupportedModelError: our classes cannot express the source.
    """
    facts = source.facts
    config_name, decoder_name, model_name = class_names(facts)
    writer = ShardWriter(folder)
    for name in source.names():
        if not name.startswith("model.layers."):
            writer.add(name, source.tensor(name).to(dtype))
    dims = []
    for layer_idx in range(facts.num_hidden_layers):
        kept = {
            name: source.tensor(f"model.layers.{layer_idx}.{name}").to(dtype)
            for name in layer_weight_names(facts, layer_idx)
            if not name.startswith("self_attn.")
        }
        # transformers renames and stacks on loading for its own classes alone.
        for name, tensor in module_tensors(facts, layer_idx, kept).items():
            writer.add(f"model.layers.{layer_idx}.{name}", tensor)
        prefix = f"model.layers.{layer_idx}.self_attn."
        layer = layers(layer_idx)
        o_bias = source.tensor(f"{prefix}o_proj.bias").to(dtype) if facts.o_bias else None
        o_weight_DO = layer.output_weight(source.tensor(f"{prefix}o_proj.weight")).to(dtype)
        for name, tensor in attention_state_dict(layer, o_weight_DO, o_bias).items():
            writer.add(prefix + name, tensor)
        dims.append(LatentDims.of(layer))
        advance()
    writer.close()

    config = latent_config(facts, dims)
    config.dtype = dtype
    config.auto_map = {
        "AutoConfig": f"configuration.{config_name}",
        "AutoModel": f"modeling.{decoder_name}",
        "AutoModelForCausalLM": f"modeling.{model_name}",
    }
    config.save_pretrained(folder)
    for file in CODE_FILES:
        shutil.copyfile(CODE / file, folder / file)
    source.save_side_files(folder)
    return {"profile": "care", "class": model_name}
