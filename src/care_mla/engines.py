"""Which engines run a DeepSeek-V3 checkpoint exactly, by its configuration alone. No files, no torch.

What engines other than transformers leave out, they leave out without a word: biases of attention, and every
RoPE scaling but YaRN with both mscales 1, whose betas llama.cpp does not read. Read in vLLM 0.33, SGLang
0.5.23 and llama.cpp, and run in vLLM and llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Of YaRN, where a configuration says nothing; llama.cpp has no others for DeepSeek models.
BETA_FAST, BETA_SLOW = 32.0, 1.0
ENGINES = {"transformers": "transformers", "vllm": "vLLM", "sglang": "SGLang", "llama.cpp": "llama.cpp"}


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
    if not _is_known(rope):
        return f"rope_type {rope['rope_type']}: {engine} takes it for yarn in DeepSeek models"
    if engine == "llama.cpp" and _betas(rope) != (BETA_FAST, BETA_SLOW):
        fast, slow = _betas(rope)
        return (
            f"rope_type yarn with beta_fast {fast:g} and beta_slow {slow:g}: llama.cpp computes with "
            f"{BETA_FAST:g} and {BETA_SLOW:g} in DeepSeek models"
        )
    return None


def is_read_alike(rope_parameters: Mapping[str, Any]) -> bool:
    """Whether all engines make the same angles and the same softmax scale of these `rope_parameters`."""
    return _is_known(rope_parameters) and _betas(rope_parameters) == (BETA_FAST, BETA_SLOW)


def _is_known(rope_parameters: Mapping[str, Any]) -> bool:
    """Whether engines beside transformers know the type, in the one spelling of YaRN that means the same."""
    if rope_parameters["rope_type"] == "yarn":
        mscales = rope_parameters.get("mscale"), rope_parameters.get("mscale_all_dim")
        return mscales == (1.0, 1.0) and rope_parameters.get("truncate", True)
    return rope_parameters["rope_type"] == "default"


def _betas(rope_parameters: Mapping[str, Any]) -> tuple[float, float]:
    fast, slow = rope_parameters.get("beta_fast"), rope_parameters.get("beta_slow")
    return BETA_FAST if fast is None else fast, BETA_SLOW if slow is None else slow
