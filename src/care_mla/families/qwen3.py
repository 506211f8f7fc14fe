"""Qwen3: the dense Qwen3 models (`Qwen3ForCausalLM`), which normalise queries and keys head by head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from care_mla.families.base import Biases, Family
from care_mla.families.qwen2 import QWEN2


def _biases(config: Mapping[str, Any]) -> Biases:
    attention = bool(config["attention_bias"])
    return Biases(q=attention, k=attention, v=attention, o=attention)


QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    defaults={**QWEN2.defaults, "head_dim": 128, "attention_bias": False},
    biases=_biases,
    blockers=QWEN2.blockers,
    qk_norm="head",
)
