"""Options of block matching, a stage of a conversion."""

from __future__ import annotations

from dataclasses import dataclass

from care_mla.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class MatchingOptions:
    """Whether, and on how much text, every converted attention is trained by itself."""

    match_steps: int = 0
    """Steps of training for each converted attention, layer by layer, so that the stream after it is the
    original's again. 0: none; 96 take minutes on a CPU for a small model."""
    match_tokens: int | None = None
    """Tokens that --match-steps trains on, of the same text. None: 512 a step, at most
    65,536, which then come again."""

    def check_matching(self) -> None:
        """Refuse numbers that mean nothing, and text that nothing reads.

        Raises:
            OptionError: the message names the option.
        """
        for flag, value, least in (("steps", self.match_steps, 0), ("tokens", self.match_tokens, 2)):
            if value is not None and value < least:
                raise OptionError(
                    f"--match-{flag} {value} is below {least}. Try --match-{flag} {least} or more."
                )
        if self.match_tokens is not None and self.match_steps == 0:
            raise OptionError(
                f"--match-tokens {self.match_tokens} has no effect without --match-steps. Add --match-steps "
                "96, or leave it out."
            )
