"""The options of `care evaluate` and `care generate`; see configs.py, which they follow."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from care_mla.configs import CommonConfig, _at_least, _check_device, _check_file, _choice
from care_mla.errors import OptionError

ChatTemplate = Literal["auto", "on", "off"]
TASK_SUFFIXES = (".json", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(CommonConfig):
    """Perplexity, tasks, needles, cache and speed of one or more models in one run."""

    models: tuple[str, ...]
    """Folders, hub ids, .gguf files or 'demo'; put the original first."""
    perplexity: tuple[Path, ...] = field(default_factory=tuple)
    """Text to measure on; may be given several times."""
    block: int = 1024
    """Tokens per block of text: L - 1 targets each, no BOS, the last partial block left out."""
    window: int | None = None
    """Tokens per window of the word-level perplexity. None: the models' context, as in lm-eval."""
    max_tokens: int | None = None
    """At most so many tokens of each text. None: all."""
    tasks: str = ""
    """Task files (.json, .jsonl) and names of lm-eval's tasks, separated by commas."""
    limit: int | None = None
    """At most so many items of each task, from its start. None: all."""
    needle: bool = False
    """Look for numbers hidden in long text, at lengths from 1,024 to the models' context."""
    passkey: bool = False
    """The same in short, monotonous text, at lengths from 128 to 2,048: for small models."""
    haystack: Path | None = None
    """The long text. None: the language reference of the installed Python."""
    needle_lengths: str = ""
    """Tokens of each prompt, separated by commas, in place of the usual lengths."""
    needle_seeds: int = 2
    """Each of three needles is tried so many times per length and depth."""
    seed: int = 0
    """One seed for everything random: the same seed hides the same numbers in the same places."""
    device: str | None = None
    """cpu, cuda, cuda:1, … None: a GPU if there is one."""
    trust_remote_code: bool = False
    """Dangerous: run Python code that comes with a model. Off, such a model is refused."""

    def __post_init__(self) -> None:
        if not self.models:
            raise OptionError("No MODEL was named. For example: care evaluate demo OUT")
        _at_least("--block", self.block, 2)
        _at_least("--window", self.window, 2)
        _at_least("--max-tokens", self.max_tokens, 2)
        # One item has no standard error, nor has a difference of one.
        _at_least("--limit", self.limit, 1)
        _at_least("--needle-seeds", self.needle_seeds, 1)
        _at_least("--seed", self.seed, 0)
        _check_device(self.device)
        _check_stems("--perplexity", [path.stem for path in self.perplexity])
        _check_stems("--tasks", [Path(name).stem for name in self.task_names()])
        self._check_idle()
        self.lengths()

    def _check_idle(self) -> None:
        """Refuse options that would do nothing."""
        if not self.perplexity:
            for flag, value in (("--window", self.window), ("--max-tokens", self.max_tokens)):
                if value is not None:
                    raise OptionError(f"{flag} {value} has no effect without a text: --perplexity FILE")
        if self.limit is not None and not self.task_names():
            raise OptionError(f"--limit {self.limit} has no effect without tasks: --tasks FILE,NAME")
        if self.haystack is not None and not self.needle:
            raise OptionError(f"--haystack {self.haystack} has no effect without --needle.")
        if self.needle_lengths and not (self.needle or self.passkey):
            raise OptionError(
                f"--needle-lengths {self.needle_lengths} has no effect without --needle or --passkey."
            )

    def task_names(self) -> list[str]:
        """What --tasks names, in order."""
        return [name.strip() for name in self.tasks.split(",") if name.strip()]

    def lengths(self) -> list[int] | None:
        """Lengths of --needle-lengths in tokens, ascending; None where it was not given."""
        words = [word.strip() for word in self.needle_lengths.split(",") if word.strip()]
        if not words:
            return None
        if not all(word.isdigit() and int(word) >= 64 for word in words):
            raise OptionError(
                f"--needle-lengths {self.needle_lengths!r}: whole numbers of 64 and more are needed, "
                "separated by commas. Try --needle-lengths 1024,2048"
            )
        return sorted({int(word) for word in words})

    def check_paths(self) -> None:
        super().check_paths()
        for path in self.perplexity:
            _check_file("--perplexity", path)
        for name in self.task_names():
            if Path(name).suffix in TASK_SUFFIXES:
                _check_file("--tasks", Path(name))
        if self.haystack is not None:
            _check_file("--haystack", self.haystack)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(CommonConfig):
    """Answers of one or more models to the same prompt, side by side."""

    models: tuple[str, ...]
    """Folders, hub ids, .gguf files or 'demo', the original first; and behind them the prompt."""
    prompt: str = ""
    """What to answer or to continue. Empty: the last of MODEL MODEL …"""
    max_new_tokens: int = 64
    """At most so many tokens of each answer."""
    temperature: float = 0.0
    """0: the likeliest token each time. Above: drawn, from the same random numbers for every model."""
    seed: int = 0
    """Of those random numbers."""
    chat_template: ChatTemplate = "auto"
    """on: the prompt is a chat's first message. off: the text itself. auto: on where the first
    model has a template."""
    device: str | None = None
    """cpu, cuda, cuda:1, … None: a GPU if there is one."""
    trust_remote_code: bool = False
    """Dangerous: run Python code that comes with a model. Off, such a model is refused."""

    def __post_init__(self) -> None:
        if not self.prompt and self.models:
            object.__setattr__(self, "prompt", self.models[-1])
            object.__setattr__(self, "models", self.models[:-1])
        if not self.models or not self.prompt:
            raise OptionError(
                'A model and a prompt are needed. For example: care generate demo OUT "What is gravity?"'
            )
        _at_least("--max-new-tokens", self.max_new_tokens, 1)
        _at_least("--temperature", self.temperature, 0)
        _at_least("--seed", self.seed, 0)
        _choice("--chat-template", self.chat_template, get_args(ChatTemplate))
        _check_device(self.device)


def _check_stems(flag: str, stems: list[str]) -> None:
    if len(set(stems)) < len(stems):
        raise OptionError(
            f"{flag}: two files have the same name without suffix ({', '.join(stems)}), and results are "
            "kept by that name. Rename one."
        )
