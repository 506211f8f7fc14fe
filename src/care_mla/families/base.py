"""What a model family must say, and the weights that follow from it. No files, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
class Family:
    """One row of the table in `registry.py`: a decoder with gated MLP, RMSNorm and half-split RoPE.

    `defaults` are the values that transformers' configuration class takes for absent keys. `biases` tells
    which projections have one, `blockers` why a configuration cannot be converted (nothing: it can), and
    `sliding_window` how far attention reaches back (None: to the start). All three receive the configuration
    with the defaults filled in. `qk_norm` and `is_post_norm` are those of `ModelFacts`.
    """

    name: str
    architecture: str
    model_type: str
    defaults: Mapping[str, Any]
    biases: Callable[[Mapping[str, Any]], Biases] = lambda config: Biases()
    blockers: Callable[[Mapping[str, Any]], list[str]] = lambda config: []
    sliding_window: Callable[[Mapping[str, Any]], int | None] = lambda config: None
    qk_norm: QkNorm | None = None
    is_post_norm: bool = False


def block_norms(facts: ModelFacts) -> tuple[str, str]:
    """Names of a layer's norm for its attention, and of that for its MLP."""
    if facts.is_post_norm:
        return "post_attention_layernorm", "post_feedforward_layernorm"
    return "input_layernorm", "post_attention_layernorm"


def layer_weight_names(facts: ModelFacts) -> dict[str, tuple[int, ...]]:
    """Tensors of a layer with their shapes, by names relative to `model.layers.{i}.`; all layers agree."""
    hidden, inner = facts.hidden_size, facts.intermediate_size
    q_rows = facts.num_attention_heads * facts.head_dim
    kv_rows = facts.num_key_value_heads * facts.head_dim
    projections = {
        "self_attn.q_proj": (q_rows, hidden, facts.q_bias),
        "self_attn.k_proj": (kv_rows, hidden, facts.k_bias),
        "self_attn.v_proj": (kv_rows, hidden, facts.v_bias),
        "self_attn.o_proj": (hidden, q_rows, facts.o_bias),
        "mlp.gate_proj": (inner, hidden, facts.mlp_bias),
        "mlp.up_proj": (inner, hidden, facts.mlp_bias),
        "mlp.down_proj": (hidden, inner, facts.mlp_bias),
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


def weight_names(facts: ModelFacts) -> dict[str, tuple[int, ...]]:
    """Every tensor that the source must have, by its transformers name, with its shape.

    A tied model has no `lm_head.weight` here: the embedding is the one tensor for both.
    """
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (facts.vocab_size, facts.hidden_size)}
    layer = layer_weight_names(facts)
    for layer_idx in range(facts.num_hidden_layers):
        shapes |= {f"model.layers.{layer_idx}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (facts.hidden_size,)
    if not facts.tie_word_embeddings:
        shapes["lm_head.weight"] = (facts.vocab_size, facts.hidden_size)
    return shapes
