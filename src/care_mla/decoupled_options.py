"""Options of the decoupled form alone: which RoPE table, and what becomes of biases.

Both decide which engines run the result, and both cost something, which a conversion measures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from care_mla.errors import OptionError

RopeTableOption = Literal["auto", "scaled", "plain"]
BiasOption = Literal["keep", "absorb"]

# These find their rope key by the complex decoupling, which can put any frequency at any angle.
TABLE_METHODS = ("fisher", "joint")


@dataclass(frozen=True, kw_only=True)
class DecoupledOptions:
    """What becomes of RoPE scaling and of biases, which few engines know in DeepSeek models."""

    rope_table: RopeTableOption = "auto"
    """Of a model with scaled RoPE. scaled: its own, exact in transformers. plain: the nearest angles of plain
    RoPE, exact in every engine. auto: plain, unless held-out text then diverges more than 1.5 times as
    much."""
    biases: BiasOption = "keep"
    """Of queries, keys and values. keep: exact in transformers. absorb: into the weights, by least squares,
    so that every engine runs the result; the loss is measured."""

    def check_decoupled(self, form: str, method: str) -> None:
        """Refuse what has no effect in this form and method.

        Raises:
            OptionError: the message names the option.
        """
        for flag, value, choices in (
            ("--rope-table", self.rope_table, get_args(RopeTableOption)),
            ("--biases", self.biases, get_args(BiasOption)),
        ):
            if value not in choices:
                raise OptionError(f"{flag} {value!r} is unknown. Choose one of: {', '.join(choices)}")
            if value != choices[0] and form != "decoupled":
                raise OptionError(
                    f"{flag} {value} has no effect with --form {form}, whose class keeps RoPE and biases as "
                    "they are. Leave it out, or choose --form decoupled."
                )
        if self.rope_table == "plain" and method not in TABLE_METHODS:
            raise OptionError(
                f"--rope-table plain: --method {method} is defined with the source's own angles. Choose "
                f"--method {' or --method '.join(TABLE_METHODS)}, or leave --rope-table out."
            )
