"""Qwen2: the dense Qwen2 and Qwen2.5 models (`Qwen2ForCausalLM`), with biases on queries, keys, values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from care_mla.families.base import Biases, Family


def _blockers(config: Mapping[str, Any]) -> list[str]:
    kinds = config.get("layer_types")
    if kinds is not None:
        other = sorted(set(kinds) - {"full_attention"})
        return (
            [f"layer_types contains {', '.join(other)}, and only full attention can be converted"]
            if other
            else []
        )
    windowed = config["use_sliding_window"] and config["sliding_window"] is not None
    if windowed and config["max_window_layers"] < config["num_hidden_layers"]:
        return [
            f"use_sliding_window is on from layer {config['max_window_layers']} to "
            f"{config['num_hidden_layers'] - 1}, and only full attention can be converted"
        ]
    return []


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    defaults={
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    biases=lambda config: Biases(q=True, k=True, v=True),
    blockers=_blockers,
)
