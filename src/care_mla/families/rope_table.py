"""Which RoPE tables a decoupled conversion may have, and how DeepSeek's configuration says them. No torch.

DeepSeek's class computes theta^(-2i/P) for a rope key of width P, and knows the scaled types. Plain tables
are read alike by every engine. Of the scaled ones only YaRN is, in one spelling; the others are exact in
transformers alone (docs/rope.md).
"""
# Letters: W width of a head that is rotated, P qk_rope_head_dim.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from care_mla.facts import ModelFacts
from care_mla.families.rope import llama3_frequency, rope_amplitude, rotary_frequencies
from care_mla.families.rope_scaling import scaled_frequencies, yarn_mscale

# A float32 table may differ by its rounding, which engines add anyway.
ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class WrittenRope:
    """`rope_parameters` of a DeepSeek model, and what all queries are multiplied by for it.

    The source's logits grow by the square of its amplitude, the written class's by what the type brings.
    """

    parameters: dict[str, Any]
    query_scale: float


def plain_frequencies(theta: float, width: int) -> list[float]:
    """Angles in radians per position of unscaled RoPE over `width` dimensions."""
    return [theta ** (-2 * i / width) for i in range(width // 2)]


def unscaled(facts: ModelFacts) -> list[bool]:
    """For each frequency of the source, whether it turns as in plain RoPE."""
    scaled = rotary_frequencies(facts)
    return [
        abs(angle / plain - 1) <= ROUNDING
        for angle, plain in zip(scaled, plain_frequencies(facts.rope_theta, 2 * len(scaled)), strict=True)
    ]


def has_choice(facts: ModelFacts) -> bool:
    """Whether there is a plain table beside the source's own."""
    return not all(unscaled(facts))


def decoupled_rope(facts: ModelFacts, width: int, *, plain: bool) -> dict[str, Any]:
    """`rope_parameters` of a decoupled model with a rope key of this width."""
    if plain:
        return {"rope_type": "default", "rope_theta": facts.rope_theta}
    table = rotary_frequencies(facts)
    rope = written_rope(facts, table[:: 2 * len(table) // width])
    assert rope is not None, f"no rope key of width {width}"
    return rope.parameters


def softmax_scale(rope_parameters: Mapping[str, Any]) -> float:
    """What DeepSeek's class multiplies logits by for `rope_parameters` as `written_rope` gives them."""
    is_yarn = rope_parameters["rope_type"] == "yarn"
    return yarn_mscale(rope_parameters["factor"]) ** 2 if is_yarn else 1.0


def written_rope(facts: ModelFacts, found: Sequence[float]) -> WrittenRope | None:
    """How DeepSeek's configuration says a table of P/2 angles; None where the source has no such table.

    Plain RoPE comes first, then the source's own type, and last the one type that can hold any table,
    longrope, which transformers alone reads right.
    """
    theta, width = facts.rope_theta, 2 * len(found)
    scaled = rotary_frequencies(facts)
    scale = rope_amplitude(facts) ** 2
    if _same(found, plain_frequencies(theta, width)):
        return WrittenRope(parameters={"rope_type": "default", "rope_theta": theta}, query_scale=scale)
    if not _same(found, scaled[:: len(scaled) // len(found)]):
        return None
    own = _own_type(facts)
    if own is not None and _same(found, _frequencies(own, width)):
        return WrittenRope(parameters=own, query_scale=scale / softmax_scale(own))
    factors = [plain / angle for plain, angle in zip(plain_frequencies(theta, width), found, strict=True)]
    table = {
        "rope_type": "longrope",
        "rope_theta": theta,
        "factor": 1.0,
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": facts.max_position_embeddings,
    }
    return WrittenRope(parameters=table, query_scale=scale)


def _own_type(facts: ModelFacts) -> dict[str, Any] | None:
    """The source's type for DeepSeek's class."""
    own = dict(facts.rope_parameters)
    # Of its rope key the class rotates all.
    own.pop("partial_rotary_factor", None)
    match facts.rope_type:
        case "linear" | "llama3":
            return own
        case "yarn":
            # With both mscales 1 every engine leaves cos and sin alone and scales the softmax by mscale^2.
            for key in ("attention_factor", "mscale", "mscale_all_dim"):
                own.pop(key, None)
            own |= {"mscale": 1.0, "mscale_all_dim": 1.0}
            return own
        case _:
            return None


def _frequencies(parameters: dict[str, Any], width: int) -> list[float]:
    plain = plain_frequencies(parameters["rope_theta"], width)
    if parameters["rope_type"] == "llama3":
        return [llama3_frequency(angle, parameters) for angle in plain]
    return scaled_frequencies(plain, parameters)


def _same(found: Sequence[float], expected: Sequence[float]) -> bool:
    return len(found) == len(expected) and all(
        abs(angle / wanted - 1) <= ROUNDING for angle, wanted in zip(found, expected, strict=True)
    )
