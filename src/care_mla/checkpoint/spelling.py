"""Two spellings of the same weights: those of a checkpoint's files, and those of transformers' modules.

Ours lies between: one tensor for each projection and expert, under Llama's names. A family says in `fused`
and `renamed` how its files differ. Reads and writes no files.
"""
# Shapes: E experts, I moe_intermediate_size, D hidden_size.

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from care_mla.errors import CheckpointError
from care_mla.facts import ModelFacts
from care_mla.families import family_of, layer_weight_names

LAYER = re.compile(r"(model\.layers\.(\d+)\.)(.+)\.(weight|bias|gate_up_proj|down_proj)")
# What all experts of a layer are in transformers' modules, and so in the profile `care`.
STACKED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


class Part(NamedTuple):
    """A tensor of ours: its name, what holds it in the files, and which rows of that (None: all)."""

    name: str
    stored: str
    rows: tuple[int | slice, ...] | None
    shape: tuple[int, ...]


def parts_of(stored: str, shape: tuple[int, ...], facts: ModelFacts) -> list[Part]:
    """The tensors of ours that a tensor in the files holds; an unknown one is itself, for `check` to refuse.

    Raises:
        CheckpointError: a fused tensor has not as many rows as its parts together.
    """
    family = family_of(facts)
    found = LAYER.fullmatch(stored)
    if found is None:
        return [Part(stored, stored, None, shape)]
    prefix, layer_idx, module, suffix = found.groups()
    if f"{module}.{suffix}" in STACKED and int(layer_idx) in facts.sparse_layers:
        return _expert_parts(stored, shape, facts)
    if module not in family.fused:
        return [Part(_renamed(stored, family.renamed), stored, None, shape)]
    names = [f"{each}.{suffix}" for each in family.fused[module]]
    expected = layer_weight_names(facts, int(layer_idx))
    if any(name not in expected for name in names):
        return [Part(stored, stored, None, shape)]
    counts = [expected[name][0] for name in names]
    if not shape or shape[0] != sum(counts):
        raise CheckpointError(
            f"{stored} has shape {list(shape)}, and config.json asks for {' + '.join(map(str, counts))} "
            f"rows: {', '.join(family.fused[module])}. Correct config.json, or download the checkpoint again."
        )
    parts, start = [], 0
    for name, count in zip(names, counts, strict=True):
        parts.append(Part(prefix + name, stored, (slice(start, start + count),), (count, *shape[1:])))
        start += count
    return parts


def _expert_parts(stored: str, shape: tuple[int, ...], facts: ModelFacts) -> list[Part]:
    prefix, _, whole = stored.rpartition(".")
    inner, hidden = facts.moe_intermediate_size, facts.hidden_size
    names, rows, size = ("down_proj",), hidden, (hidden, inner)
    if whole == "gate_up_proj":
        names, rows, size = ("gate_proj", "up_proj"), inner, (inner, hidden)
    expected = (facts.num_experts, len(names) * rows, size[1])
    if shape != expected:
        raise CheckpointError(
            f"{stored} has shape {list(shape)}, and config.json asks for {list(expected)}. Correct "
            "config.json, or download the checkpoint again."
        )
    return [
        Part(f"{prefix}.{e}.{name}.weight", stored, (e, slice(i * rows, (i + 1) * rows)), size)
        for e in range(facts.num_experts)
        for i, name in enumerate(names)
    ]


def stored_name(name: str, facts: ModelFacts) -> str:
    """What the files call the tensor that holds this one of ours."""
    family = family_of(facts)
    for whole, parts in family.fused.items():
        for part in parts:
            if f".{part}." in name:
                return name.replace(part, whole)
    if ".mlp." not in name:
        return name
    return _renamed(name, {ours: theirs for theirs, ours in family.renamed.items()})


def _renamed(name: str, renamed: Mapping[str, str]) -> str:
    for old, new in renamed.items():
        name = name.replace(old, new)
    return name


def module_tensors(facts: ModelFacts, layer_idx: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a layer under the names, and in the shapes, that transformers' modules have.

    Fused projections are joined. Experts are stacked, as all of transformers 5 has them: `gate_up_proj` (E,
    2I, D) and `down_proj` (E, D, I). A layer without its attention gives the rest.

    Args:
        facts: of the source.
        layer_idx: 0-based.
        tensors: by names relative to the layer: those of `layer_weight_names`, with or without `self_attn`.
    """
    result = dict(tensors)
    for whole, parts in family_of(facts).fused.items():
        for suffix in ("weight", "bias"):
            rows = [result.pop(f"{part}.{suffix}", None) for part in parts]
            if present := [each for each in rows if each is not None]:
                result[f"{whole}.{suffix}"] = torch.cat(present)
    if layer_idx in facts.sparse_layers and "mlp.gate.weight" in tensors:
        result |= stacked_experts(facts, result)
    return result


def stacked_experts(facts: ModelFacts, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All experts of a layer as transformers' modules have them; they are taken out of `tensors`."""
    first = tensors["mlp.experts.0.gate_proj.weight"]
    inner, hidden = first.shape
    gate_up_EJD = first.new_empty(facts.num_experts, 2 * inner, hidden)
    down_EDI = first.new_empty(facts.num_experts, hidden, inner)
    for expert_idx in range(facts.num_experts):
        prefix = f"mlp.experts.{expert_idx}"
        gate_up_EJD[expert_idx, :inner] = tensors.pop(f"{prefix}.gate_proj.weight")
        gate_up_EJD[expert_idx, inner:] = tensors.pop(f"{prefix}.up_proj.weight")
        down_EDI[expert_idx] = tensors.pop(f"{prefix}.down_proj.weight")
    return {"mlp.experts.gate_up_proj": gate_up_EJD, "mlp.experts.down_proj": down_EDI}
