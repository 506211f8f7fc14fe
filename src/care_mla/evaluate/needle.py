"""Numbers hidden in text: does a model still find what stands far back in its cache?

`needle` hides a sentence with a number in ordinary text (a file, or the language reference that comes with
Python) and asks for it at the end; `passkey` hides one in a few monotonous sentences, repeated, which small
models manage too. A model answers with its likeliest tokens, and scores only if the exact number is in them:
words in common with the sentence count for nothing, so that a broken model scores 0.
"""
# Shapes: B prompts of one length, L positions.

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from care_mla.calibrate.text import read_text_file
from care_mla.errors import CalibrationError, OptionError
from care_mla.evaluate.generation import continuations
from care_mla.evaluate.paired import difference, items, mean_of

Kind = Literal["needle", "passkey"]
# {name} is drawn too, so that a needle is not known by heart; the question ends where the number is due.
NEEDLES: dict[Kind, tuple[tuple[str, str], ...]] = {
    "needle": (
        (
            "The locker of {name} opens with the number {value}.",
            "Which number opens the locker of {name}? The locker of {name} opens with the number",
        ),
        (
            "The ship {name} is registered under the number {value}.",
            "What is the number of the ship {name}? The ship {name} is registered under the number",
        ),
        (
            "The ticket that {name} bought has the number {value}.",
            "Which number has the ticket that {name} bought? The ticket that {name} bought has the number",
        ),
    ),
    "passkey": (
        (
            "The pass key of {name} is {value}. Remember it: {value} is the pass key of {name}.",
            "What is the pass key of {name}? The pass key of {name} is",
        ),
        (
            "The door code of {name} is {value}. Remember it: {value} is the door code of {name}.",
            "What is the door code of {name}? The door code of {name} is",
        ),
        (
            "The phone number of {name} is {value}. Remember it: {value} is the phone number of {name}.",
            "What is the phone number of {name}? The phone number of {name} is",
        ),
    ),
}
DIGITS: dict[Kind, int] = {"needle": 7, "passkey": 5}
NAMES = (
    "Amara",
    "Bruno",
    "Chiara",
    "Dmitri",
    "Elif",
    "Farid",
    "Greta",
    "Hiro",
    "Irma",
    "Jonas",
    "Kaya",
    "Luis",
)
MONOTONOUS = "The road is long. The hill is steep. The wind is cold. The rain is grey. We walk and walk. "
LENGTHS: dict[Kind, tuple[int, ...]] = {
    "needle": tuple(1024 * 2**i for i in range(11)),
    "passkey": (128, 256, 512, 1024, 2048),
}
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Tokens after the number: enough for a space, too few to list guesses.
SPARE_TOKENS = 4
# Tokens of all prompts that are run together.
BATCH_TOKENS = 8192


class Trial(NamedTuple):
    """One prompt, and the number that is hidden in it."""

    length_idx: int
    depth_idx: int
    tokens_L: Tensor
    value: str


@dataclass(frozen=True)
class Search:
    """The prompts of one kind, the same for every model that reads the same token ids.

    Attributes:
        answer_tokens: how many tokens a model may answer with.
    """

    kind: Kind
    lengths: list[int]
    trials: list[Trial]
    answer_tokens: int
    haystack: str

    def same_prompts(self, other: Search) -> bool:
        """Whether another model was asked the same, token by token."""
        return len(self.trials) == len(other.trials) and all(
            torch.equal(a.tokens_L, b.tokens_L) for a, b in zip(self.trials, other.trials, strict=True)
        )


def prepare_search(
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    lengths: Sequence[int] | None,
    haystack: Path | None,
    num_seeds: int,
    seed: int,
) -> Search:
    """Build all prompts.

    Args:
        max_length: tokens of the models' context, answer included.
        lengths: of prompt and answer together; None: the usual ones, up to `max_length`.
        haystack: text of `needle`; None: Python's language reference.
        num_seeds: how often each needle is hidden at each length and depth, each time elsewhere in the text.

    Raises:
        OptionError: a length is beyond the context.
        CalibrationError: the text is shorter than the longest prompt.
    """
    chosen = (
        [length for length in LENGTHS[kind] if length <= max_length] if lengths is None else list(lengths)
    )
    if not chosen or max(chosen) > max_length:
        wanted = max(chosen or LENGTHS[kind][:1])
        raise OptionError(
            f"--{kind}: prompts of {wanted} tokens are longer than the models' context of {max_length}. "
            f"Choose shorter ones: --needle-lengths {max(64, max_length // 2)}"
        )
    text, name = _text(kind, haystack)
    hay = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if kind == "passkey":
        hay = hay * (max(chosen) // len(hay) + 1)
    if len(hay) < max(chosen):
        raise CalibrationError(
            f"--haystack {haystack}: {len(hay)} tokens are less than the longest prompt of {max(chosen)}. "
            f"Give a longer text, or shorter prompts: --needle-lengths {len(hay) // 2}"
        )
    builder = _Builder(kind, tokenizer, hay)
    trials = [
        builder.trial(i, length, j, needle_idx, seed * 1_000_003 + s)
        for i, length in enumerate(chosen)
        for j in range(len(DEPTHS))
        for needle_idx in range(len(NEEDLES[kind]))
        for s in range(num_seeds)
    ]
    return Search(kind, chosen, trials, builder.answer_tokens, name)


def find(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    search: Search,
    advance: Callable[[int], None] = lambda n: None,
) -> Tensor:
    """Whether each number was found, 1 or 0 for each trial.

    Args:
        advance: called with how many trials were answered.
    """
    found: list[float] = []
    for length in search.lengths:
        trials = [trial for trial in search.trials if search.lengths[trial.length_idx] == length]
        size = max(1, BATCH_TOKENS // length)
        for start in range(0, len(trials), size):
            batch = trials[start : start + size]
            prompts_BL = torch.stack([trial.tokens_L for trial in batch])
            answers = continuations(model, prompts_BL, search.answer_tokens)
            found += [
                float(is_found(str(tokenizer.decode(answer)), trial.value))
                for answer, trial in zip(answers, batch, strict=True)
            ]
            advance(len(batch))
    return items(found)


def is_found(answer: str, value: str) -> bool:
    """Whether exactly this number stands in an answer, not as a part of a longer one."""
    return re.search(rf"(?<!\d){value}(?!\d)", answer) is not None


def summarise_search(search: Search, found_X: Tensor, original_X: Tensor | None) -> dict[str, Any]:
    """What the JSON says: a grid of scores with a row for each length and a column for each depth."""
    shape = (len(search.lengths), len(DEPTHS))
    cells = torch.tensor([trial.length_idx * len(DEPTHS) + trial.depth_idx for trial in search.trials])
    counts_LD = torch.bincount(cells, minlength=shape[0] * shape[1]).view(shape)
    found_LD = torch.bincount(cells, weights=found_X, minlength=shape[0] * shape[1]).view(shape)
    value, stderr = mean_of(found_X)
    summary: dict[str, Any] = {
        "lengths": search.lengths,
        "depths": list(DEPTHS),
        "score": (found_LD / counts_LD).tolist(),
        "found": found_LD.long().tolist(),
        "trials": counts_LD.tolist(),
        "mean": value,
        "mean_stderr": stderr,
        "chance": 0.0,
        "answer_tokens": search.answer_tokens,
        "haystack": search.haystack,
    }
    if original_X is not None:
        summary["difference"] = difference(found_X, original_X)
    return summary


class _Builder:
    """Prompts of one kind, put together from token ids so that each has exactly the length wanted."""

    def __init__(self, kind: Kind, tokenizer: PreTrainedTokenizerBase, hay: list[int]) -> None:
        self.kind, self.tokenizer, self.hay = kind, tokenizer, hay
        start = tokenizer("", verbose=False)["input_ids"]
        self.start = [token for token in start if token == tokenizer.bos_token_id]
        self.answer_tokens = len(self._ids(f" {'7' * DIGITS[kind]}")) + SPARE_TOKENS
        self.ends = self._sentence_ends()

    def trial(self, length_idx: int, length: int, depth_idx: int, needle_idx: int, seed: int) -> Trial:
        rng = random.Random(f"{seed} {needle_idx} {length} {depth_idx}")
        value = str(rng.randrange(10 ** (DIGITS[self.kind] - 1), 10 ** DIGITS[self.kind]))
        name = rng.choice(NAMES)
        sentence, question = (text.format(name=name, value=value) for text in NEEDLES[self.kind][needle_idx])
        needle, asked = self._ids(f" {sentence}"), self._ids(f"\n\n{question}")
        room = length - self.answer_tokens - len(self.start) - len(needle) - len(asked)
        if room < 0:
            raise OptionError(
                f"--needle-lengths {length}: sentence, question and answer alone need {length - room} "
                f"tokens. Choose longer prompts: --needle-lengths {2 * length}"
            )
        begin = rng.randrange(len(self.hay) - room + 1)
        # The needle follows the last sentence that ends before its depth, so it cuts none in two.
        goal = begin + round(DEPTHS[depth_idx] * room)
        place = max((end for end in self.ends if begin < end <= goal), default=begin)
        ids = [*self.start, *self.hay[begin:place], *needle, *self.hay[place : begin + room], *asked]
        return Trial(length_idx, depth_idx, torch.tensor(ids), value)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _sentence_ends(self) -> list[int]:
        stops = {token for text in (".", "!", "?", " .") for token in self._ids(f"a{text}")[-1:]}
        return [i + 1 for i, token in enumerate(self.hay) if token in stops]


def _text(kind: Kind, haystack: Path | None) -> tuple[str, str]:
    """The text to hide numbers in, and how to call it."""
    if kind == "passkey":
        return MONOTONOUS, "monotonous sentences"
    if haystack is not None:
        return read_text_file(haystack), haystack.name
    if importlib.util.find_spec("pydoc_data") is None:
        raise OptionError(
            "--needle: this Python comes without its language reference, which numbers would be hidden in. "
            "Name a long text: --haystack FILE"
        )
    import pydoc_data.topics

    return "\n\n".join(pydoc_data.topics.topics.values()), "Python's language reference"
