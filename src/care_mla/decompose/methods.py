"""The table of methods: names, what each may choose between, and the function that factors a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from care_mla.budget import Dims, RankOptions, resolve_dims
from care_mla.configs import Form
from care_mla.decompose.absorb import absorbing
from care_mla.decompose.baselines import asvd, care_c, care_u, joint, palu, svd, svd_llm
from care_mla.decompose.fisher import decoupled_fisher, decoupled_joint, exact_fisher
from care_mla.decompose.layer_inputs import Decomposition, LayerInputs
from care_mla.decompose.mha2mla import mha2mla_joint, mha2mla_split
from care_mla.decompose.rope import decoupled_care_c, decoupled_care_u, transmla, x_ecomla
from care_mla.decoupled_options import TABLE_METHODS, DecoupledOptions
from care_mla.engines import is_read_alike
from care_mla.facts import ModelFacts
from care_mla.families.effects import has_biases
from care_mla.families.rope_table import decoupled_rope, has_choice

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
    """One way to run a method at a budget; where a method has several, held-out text decides.

    `rope_table` is None where there is but one, `absorbs_biases` tells whether biases go into the weights.
    """

    form: Form
    method: str
    kv_lora_rank: int
    qk_rope_head_dim: int
    freqfold: int | None = None
    rope_table: Literal["scaled", "plain"] | None = None
    absorbs_biases: bool = False

    @property
    def label(self) -> str:
        """A name for tables and files."""
        rope = f" P{self.qk_rope_head_dim}" if self.qk_rope_head_dim else ""
        fold = f" freqfold {self.freqfold}" if self.freqfold else ""
        table = f" {self.rope_table} RoPE table" if self.rope_table else ""
        biases = " biases absorbed" if self.absorbs_biases else ""
        return f"{self.form} {self.method} R{self.kv_lora_rank}{rope}{fold}{table}{biases}"


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


def decoupled_variants(
    found: Sequence[Variant], facts: ModelFacts, options: DecoupledOptions, *, for_engines: bool
) -> list[Variant]:
    """Variants with every RoPE table that the options leave open, and with biases absorbed if they say so.

    Args:
        found: from `variants`, of one form and method.
        options: that have an effect on this model (`check_effects`).
        for_engines: whether stock engines are to run the result; our own class keeps any table, so that
            there `auto` is the source's, as where biases are kept, which leave transformers alone to run it.
    """
    form, method = found[0].form, found[0].method
    absorb = options.biases == "absorb"
    gains = for_engines and not facts.o_bias and (absorb or not has_biases(facts))
    tables: list[Variant] = []
    for variant in found:
        choice = form == "decoupled" and method in TABLE_METHODS and has_choice(facts)
        plain, scaled = (replace(variant, rope_table=table) for table in ("plain", "scaled"))
        if not choice or (options.rope_table == "auto" and not gains):
            tables.append(variant)
        elif options.rope_table == "auto":
            # The source's own table is as good as a plain one where all engines read it alike.
            own = decoupled_rope(facts, variant.qk_rope_head_dim, plain=False)
            tables += [scaled] if is_read_alike(own) else [plain, scaled]
        else:
            tables.append(plain if options.rope_table == "plain" else scaled)
    return [replace(variant, absorbs_biases=absorb) for variant in tables]


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
    if variant.rope_table == "plain":
        arguments["plain_table"] = True
    factor = partial(function, **arguments)
    if variant.absorbs_biases:
        factor = absorbing(factor)
    return lambda inputs: factor(inputs.without_qk_norm)
