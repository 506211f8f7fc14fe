"""RoPE scaled for longer contexts: `linear`, `yarn` and `longrope` as transformers computes them. No torch.

(`llama3` is in rope.py.) Each type is a table of angles per position and an amplitude, the factor on cos and
sin (`attention_scaling` in transformers); logits grow by its square.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from care_mla.engines import BETA_FAST, BETA_SLOW
from care_mla.errors import UnsupportedModelError

# YaRN's defaults (arXiv 2309.00071, section 3.2): turns within the old context that bound its ramp.
YARN_OPTIONS = ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate")


def scaling_parameters(
    rope_type: str, found: Mapping[str, Any], config: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The keys of `rope_parameters` that a scaled type has beside theta, checked, with defaults filled in.

    The amplitude is always written as `attention_factor`, since its default follows from
    `max_position_embeddings`, which need not stay what it was.

    Args:
        rope_type: `linear`, `yarn` or `longrope`.
        found: what the configuration says about RoPE.
        config: complete but for RoPE.
        where: how error messages call the model.

    Raises:
        UnsupportedModelError: a key is missing or makes no sense.
    """
    factor = found.get("factor")
    if rope_type == "linear":
        return {"factor": _positive("factor", factor, rope_type, where)}
    # transformers gives precedence to the key beside rope_parameters, and falls back to the context length.
    length = config["max_position_embeddings"]
    original = config.get("original_max_position_embeddings") or found.get("original_max_position_embeddings")
    original = _positive("original_max_position_embeddings", original or length, rope_type, where)
    factor = _positive("factor", length / original if factor is None else factor, rope_type, where)
    parameters: dict[str, Any] = {"factor": factor, "original_max_position_embeddings": int(original)}
    if rope_type == "yarn":
        parameters |= {key: found[key] for key in YARN_OPTIONS if found.get(key) is not None}
        for key in ("beta_fast", "beta_slow"):
            _positive(key, parameters.get(key, 1.0), rope_type, where)
    else:
        for key in ("short_factor", "long_factor"):
            parameters[key] = _factors(key, found.get(key), where)
    amplitude = found.get("attention_factor")
    amplitude = _default_amplitude(rope_type, parameters) if amplitude is None else amplitude
    parameters["attention_factor"] = _positive("attention_factor", amplitude, rope_type, where)
    return parameters


def _positive(key: str, value: Any, rope_type: str, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UnsupportedModelError(
            f"{where}: {rope_type} RoPE with {key} {value!r}, expected a positive number. Its angles are "
            "undefined. Correct rope_parameters in config.json."
        )
    return float(value)


def _factors(key: str, values: Any, where: str) -> list[float]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise UnsupportedModelError(
            f"{where}: longrope RoPE with {key} {values!r}, expected a list of a number for each frequency. "
            "Its angles are undefined. Correct rope_parameters in config.json."
        )
    return [_positive(key, value, "longrope", where) for value in values]


def check_factors(parameters: Mapping[str, Any], num_frequencies: int, where: str) -> None:
    """Refuse a longrope table that is not as long as the heads are wide.

    Raises:
        UnsupportedModelError: naming the list.
    """
    for key in ("short_factor", "long_factor"):
        if len(parameters.get(key, range(num_frequencies))) != num_frequencies:
            raise UnsupportedModelError(
                f"{where}: longrope's {key} has {len(parameters[key])} entries, and heads have "
                f"{num_frequencies} frequencies. Correct rope_parameters in config.json."
            )


def _default_amplitude(rope_type: str, parameters: Mapping[str, Any]) -> float:
    factor = parameters["factor"]
    if rope_type == "longrope":
        return longrope_amplitude(factor, parameters["original_max_position_embeddings"])
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and all_dim:
        return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return yarn_mscale(factor)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's growth of queries and keys with the context's: 0.1 mscale ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def longrope_amplitude(factor: float, original_max_position_embeddings: float) -> float:
    """LongRoPE's (arXiv 2402.13753): sqrt(1 + ln(factor) / ln(original length))."""
    return (
        1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_max_position_embeddings))
    )


def switches_table(parameters: Mapping[str, Any]) -> bool:
    """Whether longrope has one table up to `original_max_position_embeddings` and another one beyond."""
    return parameters["rope_type"] == "longrope" and parameters["short_factor"] != parameters["long_factor"]


def scaled_frequencies(plain: Sequence[float], parameters: Mapping[str, Any]) -> list[float]:
    """The table of a scaled type: angles in radians per position, from the unscaled ones.

    Of longrope's two tables this is the one for positions up to `original_max_position_embeddings`.
    """
    match parameters["rope_type"]:
        case "linear":
            return [angle / parameters["factor"] for angle in plain]
        case "longrope":
            factors = parameters["short_factor"]
            return [angle / factor for angle, factor in zip(plain, factors, strict=True)]
        case "yarn":
            return [
                angle * (kept + (1 - kept) / parameters["factor"])
                for angle, kept in zip(plain, _yarn_kept(len(plain), parameters), strict=True)
            ]
        case other:
            raise AssertionError(other)


def _yarn_kept(num_frequencies: int, parameters: Mapping[str, Any]) -> list[float]:
    """How much of each frequency stays unscaled: 1 for the high ones, 0 for the low ones, a ramp between."""
    width = 2 * num_frequencies
    original, theta = parameters["original_max_position_embeddings"], parameters["rope_theta"]

    def place(turns: float) -> float:
        """The (fractional) frequency that turns so often within the old context."""
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = place(parameters.get("beta_fast") or BETA_FAST)
    high = place(parameters.get("beta_slow") or BETA_SLOW)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    return [1 - min(1.0, max(0.0, (i - low) / (high - low))) for i in range(num_frequencies)]
