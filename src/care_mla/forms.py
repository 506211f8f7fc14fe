"""Which forms a model can be converted to, and what they only approximate: known from its facts alone."""

from __future__ import annotations

from care_mla.configs import Form
from care_mla.errors import UnsupportedModelError
from care_mla.facts import ModelFacts


def form_blocker(facts: ModelFacts, form: Form) -> str | None:
    """Why a model has no conversion to a form; None where it has one."""
    if form != "exact-rope" and facts.qk_norm == "full":
        return "its QK-norm takes all heads of a key at once, of which a RoPE key beside the latent is a part"
    if form == "decoupled" and facts.is_post_norm:
        return "its norms come after attention and MLP, and MLA classes have them before"
    return None


def check_form(facts: ModelFacts, form: Form) -> None:
    """Refuse a form that the model has no conversion to, before any work.

    Raises:
        UnsupportedModelError: the message names the feature.
    """
    blocker = form_blocker(facts, form)
    if blocker is not None:
        raise UnsupportedModelError(
            f"--form {form} cannot express this {facts.family} model: {blocker}. Nothing was written. Choose "
            "--form exact-rope, which keeps it exactly."
        )


def needs_healing(facts: ModelFacts, form: Form) -> list[str]:
    """What a conversion approximates besides what the form and its rank always do; empty: nothing."""
    if form != "exact-rope" and facts.qk_norm == "head":
        return [
            "the QK-norm of queries and keys is replaced by the linear maps that come nearest to it on the "
            "calibration text"
        ]
    return []
