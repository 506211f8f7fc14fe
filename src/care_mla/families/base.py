"""What a model family must say, and the weights that follow from it. No files, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from care_mla.facts import ModelFacts, QkNorm


@dataclass(frozen=True, kw_only=True)
class Biases:
    """Which projections of a layer have a bias."""

    q: bool = False
    k: bool = False
    v: bool = False
    o: bool = False
    mlp: bool = False


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts, in the words of `ModelFacts`."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    sparse_layers: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table in `registry.py`: a decoder with gated MLP, RMSNorm and half-split RoPE.

    `defaults` are the values that transformers' configuration class takes for absent keys. `biases` tells
    which projections have one, `blockers` why a configuration cannot be converted (nothing: it can),
    `sliding_window` how far attention reaches back (None: to the start) and `experts` what stands in place of
    the MLP (None: nothing does). All four receive the configuration with the defaults filled in. `qk_norm`
    and `is_post_norm` are those of `ModelFacts`.

    Everywhere else tensors have Llama's names, and experts those of `layer_weight_names`. `fused` maps a
    module in the files, which is one in transformers' class too, to the modules whose rows it holds, in
    order; `renamed` maps parts of names in the files to ours. `has_partial_rotary` tells whether the class
    heeds `partial_rotary_factor`.
    """

    name: str
    architecture: str
    model_type: str
    defaults: Mapping[str, Any]
    biases: Callable[[Mapping[str, Any]], Biases] = lambda config: Biases()
    blockers: Callable[[Mapping[str, Any]], list[str]] = lambda config: []
    sliding_window: Callable[[Mapping[str, Any]], int | None] = lambda config: None
    experts: Callable[[Mapping[str, Any]], Experts | None] | None = None
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    has_partial_rotary: bool = False
    qk_norm: QkNorm | None = None
    is_post_norm: bool = False


def block_norms(facts: ModelFacts) -> tuple[str, str]:
    """Names of a layer's norm for its attention, and of that for its MLP."""
    if facts.is_post_norm:
        return "post_attention_layernorm", "post_feedforward_layernorm"
    return "input_layernorm", "post_attention_layernorm"


def layer_weight_names(facts: ModelFacts, layer_idx: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a layer with their shapes, by names relative to `model.layers.{layer_idx}.`."""
    hidden = facts.hidden_size
    q_rows = facts.num_attention_heads * facts.head_dim
    kv_rows = facts.num_key_value_heads * facts.head_dim
    projections = {
        "self_attn.q_proj": (q_rows, hidden, facts.q_bias),
        "self_attn.k_proj": (kv_rows, hidden, facts.k_bias),
        "self_attn.v_proj": (kv_rows, hidden, facts.v_bias),
        "self_attn.o_proj": (hidden, q_rows, facts.o_bias),
        **_mlp_projections(facts, layer_idx),
    }
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (hidden,) for name in block_norms(facts)}
    if facts.qk_norm is not None:
        shapes["self_attn.q_norm.weight"] = (facts.head_dim if facts.qk_norm == "head" else q_rows,)
        shapes["self_attn.k_norm.weight"] = (facts.head_dim if facts.qk_norm == "head" else kv_rows,)
    for name, (rows, columns, has_bias) in projections.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{name}.bias"] = (rows,)
    return shapes


def _mlp_projections(facts: ModelFacts, layer_idx: int) -> dict[str, tuple[int, int, bool]]:
    """Rows, columns and bias of the matrices of a layer's MLP, or of its router and experts."""
    hidden, inner = facts.hidden_size, facts.intermediate_size
    prefixes, projections = ["mlp"], {}
    if layer_idx in facts.sparse_layers:
        inner = facts.moe_intermediate_size
        prefixes = [f"mlp.experts.{expert_idx}" for expert_idx in range(facts.num_experts)]
        projections["mlp.gate"] = (facts.num_experts, hidden, False)
    for prefix in prefixes:
        projections[f"{prefix}.gate_proj"] = (inner, hidden, facts.mlp_bias)
        projections[f"{prefix}.up_proj"] = (inner, hidden, facts.mlp_bias)
        projections[f"{prefix}.down_proj"] = (hidden, inner, facts.mlp_bias)
    return projections


def weight_names(facts: ModelFacts) -> dict[str, tuple[int, ...]]:
    """Every tensor that the source must have, by its standard name, with its shape.

    A tied model has no `lm_head.weight` here: the embedding is the one tensor for both.
    """
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (facts.vocab_size, facts.hidden_size)}
    for layer_idx in range(facts.num_hidden_layers):
        layer = layer_weight_names(facts, layer_idx)
        shapes |= {f"model.layers.{layer_idx}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (facts.hidden_size,)
    if not facts.tie_word_embeddings:
        shapes["lm_head.weight"] = (facts.vocab_size, facts.hidden_size)
    return shapes
