"""Word-level perplexity over rolling windows: lm-eval's convention, whose numbers many papers quote.

Every token is predicted, the first one from BOS (or, without one, end of text). A window predicts W tokens
from those before them in it; the last window, which has fewer to predict, reaches back for context. Sums of
log-likelihoods are divided by the number of words, split at white space, or of bytes. A file is one document.
"""
# Shapes: L positions of a window, D hidden_size, S vocabulary.

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from care_mla.errors import CalibrationError
from care_mla.evaluate.models import final_states, head_of
from care_mla.evaluate.paired import exp
from care_mla.evaluate.perplexity import HEAD_ROWS

Window = tuple[list[int], int]


def rolling_windows(ids: Sequence[int], prefix: int, window: int) -> Iterator[Window]:
    """Inputs of each window with what follows its last token, and how many of the last ids are predicted."""
    padded = [prefix, *ids]
    for start in range(0, len(ids), window):
        end = min(start + window, len(ids))
        yield padded[max(0, end - window) : end + 1], end - start


def rolling_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], int]:
    """Token ids as lm-eval encodes a document, special tokens of the tokenizer's own habit among them.

    Returns:
        The ids, and the id that the first of them is predicted from.

    Raises:
        CalibrationError: there is no such id.
    """
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not isinstance(prefix, int):
        raise CalibrationError(
            "The tokenizer has neither a BOS nor an end of text, so there is nothing that the first word of "
            "a text could be predicted from. Set bos_token in the model's tokenizer_config.json."
        )
    begins = text.startswith(str(tokenizer.decode(prefix)))
    options = {"add_special_tokens": False} if begins else {}
    return tokenizer(text, verbose=False, **options)["input_ids"], prefix


@torch.no_grad()
def log_likelihood(
    model: PreTrainedModel, inputs: list[int], predicted: int, head_rows: int = HEAD_ROWS
) -> float:
    """Log-likelihood, in nats, of the last ids of a window from all before them."""
    tokens_L = torch.tensor(inputs)
    states_TD = final_states(model, tokens_L[None, :-1])[0, -predicted:]
    targets_T = tokens_L[-predicted:].to(states_TD.device)
    total = 0.0
    for states_XD, targets_X in zip(states_TD.split(head_rows), targets_T.split(head_rows), strict=True):
        log_XS = head_of(model)(states_XD).float().log_softmax(-1)
        total += log_XS.gather(1, targets_X[:, None]).double().sum().item()
    return total


def word_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Perplexities per word and byte of one document, and bits per byte.

    Args:
        window: tokens that a window predicts at most.
        advance: called after each window.
    """
    ids, prefix = rolling_ids(tokenizer, text)
    total = 0.0
    for inputs, predicted in rolling_windows(ids, prefix, window):
        total += log_likelihood(model, inputs, predicted)
        advance()
    words, nbytes = len(re.split(r"\s+", text)), len(text.encode())
    return {
        "word_perplexity": exp(-total / words),
        "byte_perplexity": exp(-total / nbytes),
        "bits_per_byte": -total / nbytes / math.log(2),
        "log_likelihood": total,
        "words": words,
        "bytes": nbytes,
        "tokens": len(ids),
        "window": window,
    }


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int | None) -> str:
    """The part of a text that its first `count` tokens cover; all of it for None."""
    if count is None:
        return text
    if not tokenizer.is_fast:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return text if len(ids) <= count else str(tokenizer.decode(ids[:count]))
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    return text if len(ends) <= count else text[: ends[count - 1]]


def num_windows(tokenizer: PreTrainedTokenizerBase, text: str, window: int) -> int:
    """How many windows a document has."""
    return -(-len(rolling_ids(tokenizer, text)[0]) // window)
