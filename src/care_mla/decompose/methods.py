"""The table of methods: names, what each may choose between, and the function that factors a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from care_mla.budget import Dims, RankOptions, resolve_dims
from care_mla.configs import Form
from care_mla.decompose.baselines import asvd, care_c, care_u, joint, palu, svd, svd_llm
from care_mla.decompose.fisher import decoupled_fisher, decoupled_joint, exact_fisher
from care_mla.decompose.layer_inputs import Decomposition, LayerInputs
from care_mla.decompose.mha2mla import mha2mla_joint, mha2mla_split
from care_mla.decompose.rope import decoupled_care_c, decoupled_care_u, transmla, x_ecomla
from care_mla.facts import ModelFacts

FREQFOLDS = (1, 2, 4)

# care-e and care-e-code are care-u with another allocation (configs.METHOD_ALLOCATION).
EXACT_ROPE: dict[str, Callable[[LayerInputs], Decomposition]] = {
    "svd": svd,
    "asvd": asvd,
    "svd-llm": svd_llm,
    "care-u": care_u,
    "care-e": care_u,
    "care-e-code": care_u,
    "care-c": care_c,
    "palu": palu,
    "joint": joint,
    "fisher": exact_fisher,
}
# These take qk_rope_head_dim; the FREQFOLDED ones freqfold too.
ROPE_KEYS: dict[Form, dict[str, Callable[..., Decomposition]]] = {
    "exact-rope": {},
    "decoupled": {
        "fisher": decoupled_fisher,
        "joint": decoupled_joint,
        "transmla": transmla,
        "care-u": decoupled_care_u,
        "care-e": decoupled_care_u,
        "care-c": decoupled_care_c,
        "x-ecomla": x_ecomla,
    },
    "partial-rope": {"mha2mla-joint": mha2mla_joint, "mha2mla-split": mha2mla_split},
}
FREQFOLDED = ("transmla", "care-u", "care-e", "care-c")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run a method at a budget; where a method has several, held-out text decides."""

    form: Form
    method: str
    kv_lora_rank: int
    qk_rope_head_dim: int
    freqfold: int | None = None

    @property
    def label(self) -> str:
        """A name for tables and files."""
        rope = f" P{self.qk_rope_head_dim}" if self.qk_rope_head_dim else ""
        fold = f" freqfold {self.freqfold}" if self.freqfold else ""
        return f"{self.form} {self.method} R{self.kv_lora_rank}{rope}{fold}"


def variants(facts: ModelFacts, options: RankOptions, *, form: Form, method: str) -> list[Variant]:
    """All ways to run a method at the given budget: widths of the rope key, and TransMLA's freqfold.

    Raises:
        OptionError: the options leave none.
    """
    found = []
    for dims in resolve_dims(facts, options, form=form, method=method):
        for freqfold in _freqfolds(facts, dims, form, method):
            found.append(
                Variant(
                    form=form,
                    method=method,
                    kv_lora_rank=dims.kv_lora_rank,
                    qk_rope_head_dim=dims.qk_rope_head_dim,
                    freqfold=freqfold,
                )
            )
    return found


def _freqfolds(facts: ModelFacts, dims: Dims, form: Form, method: str) -> list[int | None]:
    if form != "decoupled" or method not in FREQFOLDED:
        return [None]
    collapse = facts.rotary_dim // dims.qk_rope_head_dim
    fits = [fold for fold in FREQFOLDS if fold % collapse == 0 and facts.rotary_dim // 2 % fold == 0]
    # Narrower rope keys than FREQFOLDS reach need at least as many frequencies in a block as share a pair.
    return list(fits or [collapse])


def method_function(variant: Variant) -> Callable[[LayerInputs], Decomposition]:
    """The function that factors one layer as the variant says.

    Only the exact-rope form keeps QK-norm; the others factor the linear maps that come nearest.
    """
    if variant.form == "exact-rope":
        return EXACT_ROPE[variant.method]
    function = ROPE_KEYS[variant.form][variant.method]
    arguments: dict[str, Any] = {"qk_rope_head_dim": variant.qk_rope_head_dim}
    if variant.freqfold is not None:
        arguments["freqfold"] = variant.freqfold
    factor = partial(function, **arguments)
    return lambda inputs: factor(inputs.without_qk_norm)
