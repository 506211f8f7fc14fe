"""Mixtures of experts, from their configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from care_mla.families.base import Experts

# What transformers' Qwen3MoeConfig takes for absent keys; 128 experts too, which `qwen_experts` knows.
QWEN_DEFAULTS: dict[str, Any] = {
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "mlp_only_layers": None,
}


def expert_count(config: Mapping[str, Any], default: int) -> int:
    """How many experts a layer has: transformers takes this key, and writes it, under either name."""
    found = config.get("num_local_experts")
    return config.get("num_experts", default) if found is None else found


def qwen_experts(config: Mapping[str, Any]) -> Experts | None:
    """Every `decoder_sparse_step`-th layer has experts, but for those in `mlp_only_layers`."""
    num_experts = expert_count(config, 128)
    step, dense = config["decoder_sparse_step"], config["mlp_only_layers"] or ()
    sparse = [i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0]
    if not sparse or not num_experts:
        return None
    return Experts(
        num_experts=num_experts,
        num_experts_per_tok=config["num_experts_per_tok"],
        moe_intermediate_size=config["moe_intermediate_size"],
        norm_topk_prob=bool(config["norm_topk_prob"]),
        sparse_layers=frozenset(sparse),
    )
