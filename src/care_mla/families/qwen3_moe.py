"""Qwen3-MoE: the sparse Qwen3 models (`Qwen3MoeForCausalLM`), experts that share nothing, and QK-norm."""

from __future__ import annotations

from care_mla.families.base import Family
from care_mla.families.experts import QWEN_DEFAULTS, qwen_experts
from care_mla.families.qwen3 import QWEN3

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    defaults={
        **QWEN3.defaults,
        **QWEN_DEFAULTS,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        # Unlike the dense class, the sparse one then divides hidden_size by the number of heads.
        "head_dim": None,
    },
    biases=QWEN3.biases,
    blockers=QWEN3.blockers,
    experts=qwen_experts,
    qk_norm="head",
)
