"""Which attention kernels vLLM has for a size, and the sizes that the fast ones want. No files, no torch.

Read in vLLM 0.32 and 0.33 (`v1/attention/backends/mla`, its `prefill` folder, `platforms`): the CPU kernels
were run, the GPU kernels read. docs/engines.md has the table.
"""
# Letters: R kv_lora_rank, P qk_rope_head_dim, N qk_nope_head_dim, V v_head_dim, H head_dim.

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from care_mla.budget import Dims, resolve_dims
from care_mla.configs import PlanConfig
from care_mla.errors import ExportError, OptionError
from care_mla.facts import ModelFacts

ROPE_HEAD_DIM = 64
# Cached values that fast kernels are built for, R + P with P = 64: DeepSeek's own, and the next smaller one.
FAST_SIZES = (576, 320)
# A budget is rounded down to a fast size where that gives up at most this share of it.
ROUNDING = 0.2

PlanConfigT = TypeVar("PlanConfigT", bound=PlanConfig)


class HeadDims(NamedTuple):
    """Widths per query head: of the key without RoPE, of the RoPE key, and of the value."""

    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


# The only ones with a RoPE key that the prefill kernel of Hopper and older takes, smallest first.
PREFILL_DIMS = (HeadDims(64, 64, 128), HeadDims(128, 64, 128), HeadDims(192, 64, 256))


@dataclass(frozen=True)
class Kernel:
    """One of vLLM's attention kernels and what it says to a size.

    `phase` is `decode` or `prefill`, `device` whom it serves, `reason` why it does not run (None: it does).
    """

    name: str
    phase: str
    device: str
    reason: str | None

    @property
    def runs(self) -> bool:
        """Whether the kernel takes the size."""
        return self.reason is None


def kernels(kv_lora_rank: int, qk_rope_head_dim: int, qk_nope_head_dim: int, v_head_dim: int) -> list[Kernel]:
    """Every kernel of vLLM for this size, in the order in which vLLM tries those of one device and phase."""
    total = kv_lora_rank + qk_rope_head_dim
    dims = HeadDims(qk_nope_head_dim, qk_rope_head_dim, v_head_dim)
    given = f"here {kv_lora_rank} + {qk_rope_head_dim} = {total}"
    is_512 = (kv_lora_rank, qk_rope_head_dim) == (512, 64)
    only_576 = None if is_512 else f"takes 512 + 64 = 576 values only, {given}"
    flashinfer = None
    if not is_512 and (kv_lora_rank, qk_rope_head_dim) != (256, 64):
        flashinfer = f"takes 512 + 64 or 256 + 64 values, {given}"
    elif qk_nope_head_dim not in (64, 128, 192):
        flashinfer = f"takes qk_nope_head_dim 64, 128 or 192, here {qk_nope_head_dim}"
    prefill = None
    if dims not in PREFILL_DIMS:
        named = ", ".join(str(tuple(each)) for each in PREFILL_DIMS)
        prefill = (
            f"takes (qk_nope, qk_rope, v) head dims among {named}, here {tuple(dims)}: vLLM stops on a GPU"
        )
    return [
        Kernel("FLASH_ATTN_MLA", "decode", "Hopper", only_576),
        Kernel("FLASHMLA", "decode", "Hopper, Blackwell", only_576),
        Kernel("FLASHINFER_MLA", "decode", "Blackwell", flashinfer),
        Kernel("CUTLASS_MLA", "decode", "Blackwell", only_576),
        Kernel("TRITON_MLA", "decode", "every GPU", None),
        Kernel("CPU_MLA", "decode", "CPU", only_576),
        Kernel("FLASH_ATTN", "prefill", "every GPU", prefill),
        Kernel("CPU_SDPA", "prefill", "CPU", None),
    ]


def kernel_warnings(rows: list[Kernel]) -> list[str]:
    """What a user of this size should know before serving it, one sentence each."""
    by_name = {row.name: row for row in rows}
    warnings = []
    if not by_name["FLASH_ATTN"].runs:
        warnings.append(
            f"vLLM has no prefill kernel on GPUs for this size: it {by_name['FLASH_ATTN'].reason}."
        )
    if not by_name["FLASHMLA"].runs:
        fast = "with FLASHINFER_MLA on Blackwell and elsewhere " if by_name["FLASHINFER_MLA"].runs else ""
        warnings.append(
            f"vLLM decodes this size {fast}with TRITON_MLA, not with the kernels built for 576 "
            "values. If vLLM picks another one and stops, serve it with --attention-backend TRITON_MLA. Its "
            "CPU build cannot run it."
        )
    return warnings


def head_dims_holding(qk_nope_head_dim: int, qk_rope_head_dim: int, v_head_dim: int) -> HeadDims | None:
    """The smallest head dims that vLLM's prefill kernel takes and that hold these; None: there are none.

    A RoPE key of width P is held by one of 64 where P divides 64: its table theta^(-2i/P) is every
    (64/P)-th entry of theta^(-2i/64).
    """
    if qk_rope_head_dim < 2 or ROPE_HEAD_DIM % qk_rope_head_dim:
        return None
    for dims in PREFILL_DIMS:
        if dims.qk_nope_head_dim >= qk_nope_head_dim and dims.v_head_dim >= v_head_dim:
            return dims
    return None


def padded_head_dims(qk_nope_head_dim: int, qk_rope_head_dim: int, v_head_dim: int) -> HeadDims:
    """The head dims that `head_dims_holding` finds.

    Raises:
        ExportError: none hold these; the message names the one that does not fit.
    """
    given = HeadDims(qk_nope_head_dim, qk_rope_head_dim, v_head_dim)
    if (found := head_dims_holding(*given)) is not None:
        return found
    if ROPE_HEAD_DIM % qk_rope_head_dim:
        raise ExportError(
            f"--profile vllm: {_no_place(qk_rope_head_dim)}. Nothing was written. Choose --qk-rope-head-dim "
            f"{ROPE_HEAD_DIM} where head_dim allows it, or --profile deepseek-v3 for transformers."
        )
    raise ExportError(
        f"--profile vllm: head dims {tuple(given)} (keys without RoPE, RoPE key, values) are wider than "
        f"those of vLLM's prefill kernels, {', '.join(str(tuple(each)) for each in PREFILL_DIMS)}. Nothing "
        "was written. Choose --profile deepseek-v3 for transformers."
    )


def vllm_dims(facts: ModelFacts, dims: Dims) -> tuple[Dims, HeadDims]:
    """(R, P) and head dims of a decoupled conversion, as the profile `vllm` writes it.

    Raises:
        ExportError: see `padded_head_dims`.
    """
    heads = padded_head_dims(facts.head_dim, dims.qk_rope_head_dim, facts.head_dim)
    return Dims(dims.kv_lora_rank, heads.qk_rope_head_dim), heads


def size_kernels(facts: ModelFacts, dims: Dims) -> list[Kernel]:
    """Every kernel for a decoupled conversion, as the profile `vllm` writes it where it can."""
    heads = head_dims_holding(facts.head_dim, dims.qk_rope_head_dim, facts.head_dim)
    if heads is None:
        return kernels(*dims, facts.head_dim, facts.head_dim)
    return kernels(dims.kv_lora_rank, heads.qk_rope_head_dim, heads.qk_nope_head_dim, heads.v_head_dim)


def kernel_summary(facts: ModelFacts, dims: Dims) -> str:
    """The decode kernels of `size_kernels` in a few words, for tables."""
    rows = size_kernels(facts, dims)
    decode = [row for row in rows if row.phase == "decode"]
    named = "all" if all(row.runs for row in decode) else ", ".join(row.name for row in decode if row.runs)
    return (
        named if all(row.runs for row in rows if row.phase == "prefill") else f"{named}; no prefill on GPUs"
    )


def _no_place(width: int) -> str:
    return (
        f"a RoPE key of width {width} has no place in vLLM's kernels, which take {ROPE_HEAD_DIM} and so the "
        "widths that divide it"
    )


def head_dim_blocker(facts: ModelFacts) -> str | None:
    """Why no head dims of vLLM's kernels hold this model's; None where some do."""
    width = _rope_head_dim(facts)
    if head_dims_holding(facts.head_dim, width, facts.head_dim) is not None:
        return None
    if ROPE_HEAD_DIM % width:
        return _no_place(width)
    held = ", ".join(str(tuple(each)) for each in PREFILL_DIMS)
    return f"head_dim {facts.head_dim}: vLLM's prefill kernels take (qk_nope, qk_rope, v) head dims {held}"


def fit_vllm(facts: ModelFacts, config: PlanConfigT) -> tuple[PlanConfigT, list[str]]:
    """The options with the ranks that --profile vllm takes for their budget, and what to warn about.

    P is 64, or the widest that 64 can hold. R + 64 is a fast size where the budget is at most `ROUNDING`
    above it, else the whole budget. Ranks that the user gave are kept. Another profile changes nothing.

    Raises:
        OptionError: no rank fits the budget.
        ExportError: vLLM's kernels cannot hold the model's head dims.
    """
    if config.profile != "vllm":
        return config, []
    if config.kv_lora_rank is not None:
        assert config.qk_rope_head_dim is not None  # PlanConfig asks for both
        dims = Dims(config.kv_lora_rank, config.qk_rope_head_dim)
        return config, _size_warnings(facts, dims)
    width = config.qk_rope_head_dim or _rope_head_dim(facts)
    vllm_dims(facts, Dims(2, width))
    asked = replace(config, qk_rope_head_dim=width)
    (most,) = resolve_dims(facts, asked, form=config.form, method=config.method)
    assert config.budget is not None
    total = min(int(config.budget * facts.cached_values + 1e-9), most.kv_lora_rank + ROPE_HEAD_DIM)
    if total < ROPE_HEAD_DIM + 2:
        raise OptionError(
            f"--budget {config.budget} of {facts.cached_values} cached values leaves {total}, and --profile "
            f"vllm needs {ROPE_HEAD_DIM} of them for the RoPE key. Try --budget "
            f"{_share(facts, ROPE_HEAD_DIM + 2)} or more, or --profile deepseek-v3."
        )
    fast = [size for size in FAST_SIZES if total * (1 - ROUNDING) <= size <= total]
    rank = (fast[0] if fast else total // 2 * 2) - ROPE_HEAD_DIM
    fitted = replace(config, budget=None, kv_lora_rank=rank, qk_rope_head_dim=width)
    return fitted, _size_warnings(facts, Dims(rank, width))


def _rope_head_dim(facts: ModelFacts) -> int:
    """The widest RoPE key of this model that a key of 64 can hold; another where there is none."""
    widths = [facts.rotary_dim // fold for fold in (1, 2, 4, 8) if facts.rotary_dim % (2 * fold) == 0]
    return next((width for width in widths if ROPE_HEAD_DIM % width == 0), min(widths))


def _size_warnings(facts: ModelFacts, dims: Dims) -> list[str]:
    written, heads = vllm_dims(facts, dims)
    warnings = kernel_warnings(kernels(*written, heads.qk_nope_head_dim, heads.v_head_dim))
    if written != dims:
        warnings.append(
            f"the RoPE key of {dims.qk_rope_head_dim} is written with zeros up to "
            f"{written.qk_rope_head_dim}, as vLLM's kernels take it, so that {sum(written)} values are "
            "cached per token and layer."
        )
    budgets = [
        f"--budget {budget} ({size - ROPE_HEAD_DIM} + {ROPE_HEAD_DIM} = {size} values)"
        for size, budget in fast_budgets(facts).items()
    ]
    if sum(written) in FAST_SIZES or not budgets:
        return warnings
    return [*warnings, f"A size that vLLM's fast kernels take: {' or '.join(budgets)}."]


def fast_budgets(facts: ModelFacts) -> dict[int, float]:
    """Budgets of the sizes that vLLM's fast kernels take and that are smaller than the original's cache."""
    return {size: _share(facts, size) for size in FAST_SIZES if size < facts.cached_values}


def _share(facts: ModelFacts, values: int) -> float:
    """The budget of so many cached values, in digits that can be typed."""
    return -int(-values / facts.cached_values * 10_000 // 1) / 10_000
