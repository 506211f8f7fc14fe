"""Which engines run a DeepSeek-V3 checkpoint exactly, by its configuration alone. No files, no torch.

What engines other than transformers leave out, they leave out without a word: biases of attention, and every
RoPE scaling but YaRN with both mscales 1. Read in vLLM 0.33, SGLang 0.5.23 and llama.cpp, and run in vLLM and
llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ENGINES = {"transformers": "transformers", "vllm": "vLLM", "sglang": "SGLang", "llama.cpp": "llama.cpp"}


def engine_verdicts(config: Mapping[str, Any]) -> dict[str, bool | str]:
    """For each engine, True where it computes what a written DeepSeek configuration says, else why not."""
    return {key: engine_blocker(config, name) or True for key, name in ENGINES.items()}


def engine_blocker(config: Mapping[str, Any], engine: str) -> str | None:
    """Why an engine does not run a DeepSeek-V3 checkpoint exactly; None where it does.

    Args:
        config: of the checkpoint; `attention_bias` and `rope_parameters` decide.
        engine: `transformers`, or one of the others by its name.
    """
    if engine == "transformers":
        return None
    if config.get("attention_bias"):
        return f"attention biases: {engine} ignores them in DeepSeek models"
    rope = config["rope_parameters"]
    if not is_read_alike(rope):
        return f"rope_type {rope['rope_type']}: {engine} takes it for yarn in DeepSeek models"
    return None


def is_read_alike(rope_parameters: Mapping[str, Any]) -> bool:
    """Whether all engines make the same angles and the same softmax scale of these `rope_parameters`."""
    if rope_parameters["rope_type"] == "yarn":
        mscales = rope_parameters.get("mscale"), rope_parameters.get("mscale_all_dim")
        return mscales == (1.0, 1.0) and rope_parameters.get("truncate", True)
    return rope_parameters["rope_type"] == "default"
