"""Llama: Llama 1 to 3.x, SmolLM, TinyLlama, Yi and everything else that is saved as `LlamaForCausalLM`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from care_mla.families.base import Biases, Family


def _biases(config: Mapping[str, Any]) -> Biases:
    attention, mlp = bool(config["attention_bias"]), bool(config["mlp_bias"])
    return Biases(q=attention, k=attention, v=attention, o=attention, mlp=mlp)


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "mlp_bias": False,
    },
    biases=_biases,
)
