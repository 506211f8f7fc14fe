"""OLMo 2 (`Olmo2ForCausalLM`): QK-norm over all heads at once, and norms after attention and MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from care_mla.families.base import Biases, Family


def _biases(config: Mapping[str, Any]) -> Biases:
    attention = bool(config["attention_bias"])
    return Biases(q=attention, k=attention, v=attention, o=attention)


OLMO2 = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    defaults={
        "vocab_size": 50304,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
    },
    biases=_biases,
    qk_norm="full",
    is_post_norm=True,
)
