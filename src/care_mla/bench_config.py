"""The options of `care bench`; see configs.py, which they follow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from care_mla.configs import CommonConfig, _at_least, _check_device, _check_file, _choice
from care_mla.errors import OptionError

What = Literal["decode", "memory", "convert"]
CONTEXTS = (256, 1024, 4096)
REPEATS: dict[What, int] = {"decode": 5, "memory": 1, "convert": 1}
# Options that some of the measurements have no use for.
IDLE: dict[What, tuple[str, ...]] = {
    "decode": ("conversion", "scratch"),
    "memory": ("conversion", "scratch", "new_tokens"),
    "convert": ("context", "batch_size", "new_tokens", "dtype"),
}


@dataclass(frozen=True, kw_only=True)
class BenchConfig(CommonConfig):
    """Measure speed and memory: every row is the median of several measurements, with their spread.

    decode: tokens per second after prompts of several lengths; all models are in memory and take turns, so
    that a noisy machine is noisy for each. memory: bytes of the cache and of the whole, each model in a
    process of its own. convert: seconds of every stage of a conversion.
    """

    what: What
    """decode, memory or convert."""
    models: tuple[str, ...]
    """Folders, hub ids, .gguf files or 'demo'; put the original first. convert takes one."""
    context: str = ""
    """Tokens before those that are timed, separated by commas. Empty: 256,1024,4096, as far as models go."""
    batch_size: int = 1
    """Sequences at once."""
    new_tokens: int = 16
    """Tokens that are timed one by one."""
    repeats: int | None = None
    """Measurements of each row. None: 5 of decode, 1 of memory and convert."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights. None: bfloat16 on a GPU, float32 on a CPU."""
    conversion: Path | None = None
    """YAML recipe of the conversion that is timed. None: the defaults of care convert."""
    scratch: Path | None = None
    """Folder where conversions are written and removed again. None: the system's temporary one."""
    device: str | None = None
    """cpu, cuda, cuda:1, … None: a GPU if there is one."""
    trust_remote_code: bool = False
    """Dangerous: run Python code that comes with a model. Off, such a model is refused."""

    def __post_init__(self) -> None:
        _choice("WHAT", self.what, get_args(What))
        if not self.models or (self.what == "convert" and len(self.models) > 1):
            number = "one MODEL" if self.what == "convert" else "at least one MODEL"
            raise OptionError(
                f"care bench {self.what} takes {number}. For example: care bench {self.what} demo"
            )
        _at_least("--batch-size", self.batch_size, 1)
        _at_least("--new-tokens", self.new_tokens, 1)
        _at_least("--repeats", self.repeats, 1)
        _check_device(self.device)
        for name in IDLE[self.what]:
            if (value := getattr(self, name)) != getattr(BenchConfig, name):
                flag = f"--{name.replace('_', '-')} {value}"
                raise OptionError(f"{flag} has no effect with care bench {self.what}. Leave it out.")
        self.contexts(max(CONTEXTS))

    @property
    def number(self) -> int:
        """Measurements of each row."""
        return self.repeats or REPEATS[self.what]

    def contexts(self, longest: int) -> list[int]:
        """Lengths in tokens, ascending; the usual ones only as far as `longest`.

        Raises:
            OptionError: --context holds no whole numbers.
        """
        words = [word.strip() for word in self.context.split(",")]
        if words == [""]:
            return [length for length in CONTEXTS if length <= longest] or [longest]
        if not all(word.isdecimal() and int(word) >= 1 for word in words):
            raise OptionError(
                f"--context {self.context!r}: whole numbers are needed, separated by commas. Try "
                "--context 256,1024"
            )
        return sorted({int(word) for word in words})

    def check_paths(self) -> None:
        super().check_paths()
        if self.conversion is not None:
            _check_file("--conversion", self.conversion)
        if self.scratch is not None and not self.scratch.is_dir():
            raise OptionError(f"--scratch {self.scratch} is not a folder. Make it first, or leave it out.")
