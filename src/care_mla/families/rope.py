"""RoPE as the configuration says it: one spelling for old and new keys, and the angles. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from care_mla.errors import UnsupportedModelError
from care_mla.facts import ModelFacts
from care_mla.families.rope_scaling import scaled_frequencies, scaling_parameters

DEFAULT_THETA = 10000.0  # transformers' default for all supported families
ROPE_TYPES = ("default", "linear", "yarn", "longrope", "llama3")
OLD_NAMES = {"su": "longrope"}  # of Phi-3's first release
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rope_parameters(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The `rope_parameters` of a configuration, from `rope_theta` and `rope_scaling` in the old spelling.

    Precedence is transformers': `rope_scaling`, when set, replaces `rope_parameters`, and keys inside win
    over keys beside them.

    Args:
        config: complete but for RoPE.
        where: how error messages call the model.

    Raises:
        UnsupportedModelError: RoPE has no fixed table of angles, or turns only a part of the head.
    """
    found = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in found.values()):
        raise UnsupportedModelError(
            f"{where}: rope_parameters differ between kinds of layers ({', '.join(found)}). One latent rope "
            "key needs one table of angles. Choose a model with the same RoPE in all layers."
        )
    rope_type = found.get("rope_type", found.get("type", "default"))
    theta = found.get("rope_theta", config.get("rope_theta", DEFAULT_THETA))
    rope_type = OLD_NAMES.get(rope_type, rope_type)
    if rope_type not in ROPE_TYPES:
        is_dynamic = rope_type == "dynamic"
        reason = "changes its angles with the length of the text" if is_dynamic else "is unknown here"
        raise UnsupportedModelError(
            f"{where}: rope_type is {rope_type!r}, which {reason}, and a converted model has one table of "
            f"angles. Supported: {', '.join(ROPE_TYPES)}. Choose the model without this scaling, often the "
            "same checkpoint before its context extension."
        )
    if not isinstance(theta, int | float) or theta <= 1:
        raise UnsupportedModelError(
            f"{where}: rope_theta is {theta!r}, expected a number above 1. Correct config.json."
        )
    parameters: dict[str, Any] = {"rope_type": rope_type, "rope_theta": float(theta)}
    if rope_type == "llama3":
        parameters |= _llama3(found, config, where)
    elif rope_type != "default":
        parameters |= scaling_parameters(rope_type, found, config, where)
    partial = found.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        parameters["partial_rotary_factor"] = partial
    return parameters


def rotary_dim(
    config: Mapping[str, Any], parameters: Mapping[str, Any], where: str, *, is_heeded: bool
) -> int:
    """How many dimensions of a head RoPE turns: the first ones, as transformers counts them.

    Args:
        config: with `head_dim`.
        parameters: from `rope_parameters`.
        where: how error messages call the model.
        is_heeded: whether the model's class rotates a part of the head if asked to.

    Raises:
        UnsupportedModelError: the class rotates whole heads whatever the configuration says, or the part is
            no number of pairs.
    """
    head_dim: int = config["head_dim"]
    partial = parameters.get("partial_rotary_factor")
    if partial is None:
        return head_dim
    if not is_heeded:
        raise UnsupportedModelError(
            f"{where}: partial_rotary_factor is {partial}, but transformers' class rotates whole heads for "
            "plain RoPE, so it is unclear what the model is. Correct config.json, or choose a model that "
            "rotates whole heads."
        )
    width = int(head_dim * partial) if isinstance(partial, int | float) else 0
    if not 0 < width <= head_dim or width % 2:
        raise UnsupportedModelError(
            f"{where}: partial_rotary_factor {partial!r} of head_dim {head_dim} rotates {width} dimensions, "
            "and RoPE turns pairs of them. Correct config.json."
        )
    return width


def _llama3(found: Mapping[str, Any], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    values: dict[str, Any] = {key: found.get(key) for key in LLAMA3_KEYS}
    # transformers gives precedence to the key beside rope_parameters, and falls back to the context length.
    beside = config.get("original_max_position_embeddings")
    values["original_max_position_embeddings"] = (
        beside or values["original_max_position_embeddings"] or config["max_position_embeddings"]
    )
    wrong = [key for key, value in values.items() if not isinstance(value, int | float) or value <= 0]
    if wrong:
        raise UnsupportedModelError(
            f"{where}: llama3 RoPE without a valid {', '.join(wrong)} (found {dict(found)}). Its angles are "
            "undefined. Correct rope_parameters in config.json."
        )
    if values["high_freq_factor"] <= values["low_freq_factor"]:
        raise UnsupportedModelError(
            f"{where}: llama3 RoPE with high_freq_factor {values['high_freq_factor']} not above "
            f"low_freq_factor {values['low_freq_factor']}. Its angles are undefined. Correct rope_parameters "
            "in config.json."
        )
    return values


def rotary_frequencies(facts: ModelFacts) -> list[float]:
    """Angles in radians per position of the pairs (i, i + rotary_dim/2) of a head, scaling included."""
    theta = facts.rope_theta
    plain = [theta ** (-2 * i / facts.rotary_dim) for i in range(facts.rotary_dim // 2)]
    match facts.rope_type:
        case "default":
            return plain
        case "llama3":
            return [llama3_frequency(angle, facts.rope_parameters) for angle in plain]
        case _:
            return scaled_frequencies(plain, facts.rope_parameters)


def rope_amplitude(facts: ModelFacts) -> float:
    """What RoPE multiplies queries and keys by (transformers' `attention_scaling`); logits by its square."""
    return float(facts.rope_parameters.get("attention_factor", 1.0))


def pair_order(facts: ModelFacts) -> list[int]:
    """The order of a head's dimensions in which all of the head is half-split pairs (i, i + H/2).

    The pairs that RoPE turns come first, in their own order; then the dimensions that it passes, as pairs
    that turn by 0. Logits stay the same if queries and keys take the same order, so that all that follows
    knows whole heads alone. Where RoPE turns all of the head, the order is as it was.
    """
    half = facts.rotary_dim // 2
    passed = range(facts.rotary_dim, facts.head_dim)
    first, second = passed[: len(passed) // 2], passed[len(passed) // 2 :]
    return [*range(half), *first, *range(half, facts.rotary_dim), *second]


def passed_scale(facts: ModelFacts) -> float:
    """What queries and keys are multiplied by in the dimensions that RoPE passes.

    RoPE's amplitude is on the others alone, but counts for all of the head wherever logits are scaled by it.
    """
    return 1 / float(facts.rope_parameters.get("attention_factor", 1.0))


def llama3_frequency(angle: float, parameters: Mapping[str, Any]) -> float:
    """One angle scaled as in Llama 3.1: low ones by 1/factor, high ones kept, a ramp between."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * angle / (2 * math.pi)
    kept = min(1.0, max(0.0, (turns - low) / (high - low)))
    return angle * (kept + (1 - kept) / parameters["factor"])
