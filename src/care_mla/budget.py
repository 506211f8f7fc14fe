"""From a budget to ranks: the widths of latent and RoPE key that a cache of a given size allows.

Reads a model's facts and the options; writes nothing. The one currency is cached values per token per layer,
RoPE key included.
"""
# Shapes: G KV heads, H head_dim, R kv_lora_rank, P qk_rope_head_dim.

from __future__ import annotations

from typing import NamedTuple, Protocol

from care_mla.configs import SEPARATE_METHODS, Form
from care_mla.errors import OptionError
from care_mla.facts import ModelFacts

MAX_ROPE_HEAD_DIM = 64  # the width that the fast kernels of stock engines are built for


class Dims(NamedTuple):
    """Widths of one layer's cache: the latent, and one RoPE key (0 in the exact-rope form)."""

    kv_lora_rank: int
    qk_rope_head_dim: int


class RankOptions(Protocol):
    """The options that fix the size of the cache; see RankConfig."""

    @property
    def budget(self) -> float | None: ...
    @property
    def kv_lora_rank(self) -> int | None: ...
    @property
    def qk_rope_head_dim(self) -> int | None: ...


def cached_values(facts: ModelFacts, form: Form, dims: Dims) -> int:
    """Cached values per token per layer after conversion: R, plus P for each RoPE key."""
    rope_keys = {"exact-rope": 0, "decoupled": 1, "partial-rope": facts.num_key_value_heads}[form]
    return dims.kv_lora_rank + rope_keys * dims.qk_rope_head_dim


def resolve_dims(facts: ModelFacts, options: RankOptions, *, form: Form, method: str) -> list[Dims]:
    """The (R, P) that the options allow, largest P first; more than one is decided on held-out text.

    Raises:
        OptionError: no rank fits the budget, or the model has no such rank or width; the message gives the
            nearest.
    """
    widths = _rope_widths(facts, options.qk_rope_head_dim, form)
    is_separate = method in SEPARATE_METHODS[form]
    full_rank = _full_rank(facts, is_separate=is_separate)
    if options.kv_lora_rank is not None:
        return [_given(facts, options.kv_lora_rank, form, method, widths, full_rank)]
    assert options.budget is not None
    total = int(options.budget * facts.cached_values + 1e-9)  # 0.3 * 10 is 2.999…
    # R is even in the decoupled form for engines' sake, and where keys and values share it equally.
    step = 2 if form == "decoupled" or is_separate else 1
    candidates = []
    for width in widths:
        rank = total - cached_values(facts, form, Dims(0, width))
        rank = min(rank // step * step, full_rank)
        if rank >= step:
            candidates.append(Dims(rank, width))
    if not candidates:
        least = (cached_values(facts, form, Dims(step, widths[-1]))) / facts.cached_values
        raise OptionError(
            f"--budget {options.budget} of {facts.cached_values} cached values leaves {total}, too few for a "
            "latent "
            f"and a RoPE key of width {widths[-1]} in --form {form}. Try --budget {_round_up(least)} or more."
        )
    return candidates


def _rope_widths(facts: ModelFacts, given: int | None, form: Form) -> list[int]:
    """Widths of the RoPE key to try: fractions of what RoPE turns, since neighbouring frequencies fold."""
    if form == "exact-rope":
        return [0]
    folds = (1, 2, 4, 8) if form == "decoupled" else (2, 4, 8)
    widths = [facts.rotary_dim // fold for fold in folds if facts.rotary_dim % (2 * fold) == 0]
    if given is not None:
        if given not in widths:
            raise OptionError(
                f"--qk-rope-head-dim {given} does not divide the {facts.rotary_dim} dimensions that RoPE "
                f"turns in each head as --form {form} needs. "
                f"Choose one of: {', '.join(map(str, widths))}"
            )
        return [given]
    return [width for width in widths if form == "partial-rope" or width <= MAX_ROPE_HEAD_DIM]


def _full_rank(facts: ModelFacts, *, is_separate: bool) -> int:
    if is_separate:
        return 2 * min(facts.hidden_size, facts.num_key_value_heads * facts.head_dim)
    return min(facts.hidden_size, facts.cached_values)


def _given(facts: ModelFacts, rank: int, form: Form, method: str, widths: list[int], full_rank: int) -> Dims:
    """The ranks that the user gave, checked against the model."""
    dims = Dims(rank, widths[0])
    if rank > full_rank:
        raise OptionError(
            f"--kv-lora-rank {rank} is above the full rank {full_rank} of this model's keys and values. "
            f"Try --kv-lora-rank {full_rank} or less."
        )
    if method in SEPARATE_METHODS[form] and rank % 2:
        raise OptionError(
            f"--kv-lora-rank {rank} is odd, but --method {method} shares it equally between keys and values. "
            f"Try --kv-lora-rank {rank - 1 if rank > 1 else 2}"
        )
    if cached_values(facts, form, dims) > facts.cached_values:
        raise OptionError(
            f"--kv-lora-rank {rank} with a RoPE key of {cached_values(facts, form, dims) - rank} values "
            "caches more "
            f"than the original's {facts.cached_values} values per token and layer. "
            "Try --kv-lora-rank "
            f"{facts.cached_values - cached_values(facts, form, Dims(0, dims.qk_rope_head_dim))}"
        )
    return dims


def _round_up(share: float) -> float:
    """A budget of at least this share, in three digits that can be typed."""
    return -int(-share * 1000 // 1) / 1000
