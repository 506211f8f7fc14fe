"""Mistral: the dense models that are saved as `MistralForCausalLM`, with or without a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from care_mla.families.base import Family


def _sliding_window(config: Mapping[str, Any]) -> int | None:
    return config["sliding_window"]


def _blockers(config: Mapping[str, Any]) -> list[str]:
    if len(kinds := set(config.get("layer_types") or ())) > 1:
        return [f"layer_types mixes {', '.join(sorted(kinds))}, and every layer must see the same window"]
    return []


MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    model_type="mistral",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
    blockers=_blockers,
    sliding_window=_sliding_window,
)
