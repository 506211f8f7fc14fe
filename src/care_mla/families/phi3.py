"""Phi-3 and Phi-4: what is saved as `Phi3ForCausalLM`, with fused projections, some with partial rotary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from care_mla.families.base import Family


def _blockers(config: Mapping[str, Any]) -> list[str]:
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = found.get("rope_type", found.get("type", "default"))
    if rope_type == "llama3":
        return ["rope_type is 'llama3', which transformers' Phi-3 refuses"]
    return []


PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    defaults={
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    blockers=_blockers,
    sliding_window=lambda config: config["sliding_window"],
    fused={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
    has_partial_rotary=True,
)
