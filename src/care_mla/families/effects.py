"""Options of the decoupled form against a model: refused where they would do nothing. No torch."""

from __future__ import annotations

from care_mla.decoupled_options import DecoupledOptions
from care_mla.errors import OptionError
from care_mla.facts import ModelFacts
from care_mla.families.rope_table import has_choice


def check_effects(facts: ModelFacts, options: DecoupledOptions) -> None:
    """Refuse an option that has no effect on this model, or cannot do what it says.

    Raises:
        OptionError: the message names the option and the model's feature.
    """
    if options.rope_table != "auto" and not has_choice(facts):
        raise OptionError(
            f"--rope-table {options.rope_table} has no effect: RoPE of this {facts.family} model is plain "
            f"already (rope_type {facts.rope_type}). Leave it out."
        )
    if options.biases == "absorb":
        if facts.o_bias:
            raise OptionError(
                f"--biases absorb: this {facts.family} model has a bias on o_proj, which is added whatever "
                "attention sees, so that no weight can take it in. Nothing was written. Leave --biases out."
            )
        if not has_biases(facts):
            raise OptionError(
                f"--biases absorb has no effect: attention of this {facts.family} model has no biases. Leave "
                "it out."
            )


def has_biases(facts: ModelFacts) -> bool:
    """Whether queries, keys or values have biases."""
    return facts.q_bias or facts.k_bias or facts.v_bias
