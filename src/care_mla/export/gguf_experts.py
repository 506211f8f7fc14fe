"""Mixtures of experts as llama.cpp's `deepseek2` has them: their keys, and a layer's experts as one tensor.

llama.cpp wants an expert that all tokens share, which the sources have not: its weights are zeros. The scale
of the residual stream is in the weights of the chosen experts, so that the experts pass to the bit.
"""
# Shapes: E experts, O rows and I columns of an expert's projection.

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import gguf
import torch
from torch import Tensor

from care_mla.facts import ModelFacts

if TYPE_CHECKING:
    from care_mla.checkpoint.source import Source

# The router decides between experts and is small: llama.cpp's own converter keeps it in float32 too.
ROUTER = "ffn_gate_inp"
PROJECTIONS = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def write_expert_metadata(writer: gguf.GGUFWriter, facts: ModelFacts, scale: float) -> None:
    """Write the keys about experts.

    Args:
        scale: of the residual stream.
    """
    writer.add_expert_shared_count(1)
    if not facts.sparse_layers:
        # Without them llama.cpp does not load a dense model either; no weights belong to them.
        writer.add_leading_dense_block_count(facts.num_hidden_layers)
        writer.add_expert_feed_forward_length(8)
        return
    writer.add_leading_dense_block_count(min(facts.sparse_layers))
    writer.add_expert_feed_forward_length(facts.moe_intermediate_size)
    writer.add_expert_count(facts.num_experts)
    writer.add_expert_used_count(facts.num_experts_per_tok)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    writer.add_expert_weights_norm(facts.norm_topk_prob)
    writer.add_expert_weights_scale(facts.routed_scaling_factor * scale)


def expert_shapes(facts: ModelFacts, layer_idx: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a layer's experts, the shared one last, with their shapes; none in a dense layer."""
    if layer_idx not in facts.sparse_layers:
        return {}
    inner, hidden = facts.moe_intermediate_size, facts.hidden_size
    sizes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    prefix = f"blk.{layer_idx}."
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}{name}_exps.weight": (facts.num_experts, *sizes[module])
        for module, name in PROJECTIONS.items()
    }
    return shapes | {f"{prefix}{name}_shexp.weight": sizes[module] for module, name in PROJECTIONS.items()}


def expert_tensors(source: Source, layer_idx: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `expert_shapes` in that order; one projection of all experts is in memory at a time."""
    facts = source.facts
    modules = {name: module for module, name in PROJECTIONS.items()}
    for name, shape in expert_shapes(facts, layer_idx).items():
        module, _, kind = name.split(".")[2].rpartition("_")
        if kind == "shexp":
            yield name, torch.zeros(shape)
            continue
        prefix = f"model.layers.{layer_idx}.mlp.experts."
        names = [f"{prefix}{expert_idx}.{modules[module]}.weight" for expert_idx in range(facts.num_experts)]
        w_EOI = torch.empty(shape, dtype=source.dtype(names[0]))
        for expert_idx, each in enumerate(names):
            w_EOI[expert_idx] = source.tensor(each)
        yield name, w_EOI
