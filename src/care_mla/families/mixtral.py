"""Mixtral: the sparse Mistral models (`MixtralForCausalLM`), experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from care_mla.families.base import Experts, Family
from care_mla.families.experts import expert_count


def _experts(config: Mapping[str, Any]) -> Experts:
    return Experts(
        num_experts=expert_count(config, 8),
        num_experts_per_tok=config["num_experts_per_tok"],
        moe_intermediate_size=config["intermediate_size"],
        # The class divides by the sum unasked.
        norm_topk_prob=True,
        sparse_layers=frozenset(range(config["num_hidden_layers"])),
    )


MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_experts_per_tok": 2,
    },
    sliding_window=lambda config: config["sliding_window"],
    experts=_experts,
    renamed={
        "block_sparse_moe.": "mlp.",
        ".w1.": ".gate_proj.",
        ".w2.": ".down_proj.",
        ".w3.": ".up_proj.",
    },
)
