"""Perplexity by blocks of tokens, and how predictions differ from the original's on the same blocks.

No BOS is added, blocks of L tokens do not overlap, each predicts its L - 1 last tokens from those before
them, and the last partial block is left out.
"""
# Shapes: B blocks, L positions, S vocabulary, T predicted tokens of a block (L - 1), D hidden_size.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from care_mla.calibrate.text import read_text_file
from care_mla.errors import CalibrationError
from care_mla.evaluate.agreement import OriginalStates
from care_mla.evaluate.models import final_states, head_of
from care_mla.evaluate.paired import difference, exp, mean_of

HEAD_ROWS = 512
# Positions are told apart by so many: 0-1k, 1k-2k, …
POSITIONS = 1024


@dataclass(frozen=True)
class BlockScores:
    """One model on one text, token by token, in nats.

    Attributes:
        nll_BT: negative log-likelihood of what follows.
        kl_BT: KL(original || model) there; None for the original itself, and for another vocabulary.
        agrees_BT: whether the likeliest token is the original's; None as above.
    """

    nll_BT: Tensor
    kl_BT: Tensor | None = None
    agrees_BT: Tensor | None = None


def token_blocks(
    tokenizer: PreTrainedTokenizerBase, path: Path, *, block: int, max_tokens: int | None
) -> Tensor:
    """A text file as blocks of token ids (B, L).

    Raises:
        CalibrationError: the file cannot be read as text, or has less than one block.
    """
    text = read_text_file(path)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    if len(ids) < block:
        raise CalibrationError(
            f"{path}: {len(ids)} tokens are less than one block of {block}, so nothing could be measured. "
            f"Give a longer text, or --block {max(2, len(ids))}"
        )
    return torch.tensor(ids[: len(ids) // block * block]).view(-1, block)


@torch.no_grad()
def log_probs(model: PreTrainedModel, tokens_L: Tensor) -> Tensor:
    """Log-probabilities (L - 1, S) of what follows each token of one block but the last."""
    device = next(model.parameters()).device
    logits_LS = model(tokens_L[None].to(device), use_cache=False).logits[0, :-1]
    return logits_LS.float().log_softmax(-1)


@torch.no_grad()
def score_blocks(
    model: PreTrainedModel,
    tokens_BL: Tensor,
    *,
    keep: OriginalStates | None = None,
    original: OriginalStates | None = None,
    advance: Callable[[], None] = lambda: None,
) -> BlockScores:
    """Score every block; logits are made a few rows at a time.

    Args:
        keep: filled with the model's own states, for those after it.
        original: what KL and agreement compare with.
        advance: called after each block.
    """
    head = head_of(model)
    nll_BT = torch.zeros(len(tokens_BL), tokens_BL.shape[1] - 1, dtype=torch.float64)
    kl_BT = torch.zeros_like(nll_BT)
    agrees_BT = torch.zeros_like(nll_BT)
    for b, tokens_L in enumerate(tokens_BL):
        states_TD = final_states(model, tokens_L[None])[0, :-1]
        if keep is not None:
            keep.states_BTD[b] = states_TD.float().cpu()
        for rows_X in torch.arange(len(states_TD)).split(HEAD_ROWS):
            log_XS = head(states_TD[rows_X]).float().log_softmax(-1)
            targets_X1 = tokens_L[rows_X + 1, None].to(log_XS.device)
            nll_BT[b, rows_X] = -log_XS.gather(1, targets_X1)[:, 0].double().cpu()
            if original is not None:
                states_XD = original.states_BTD[b, rows_X].to(log_XS.device, original.head.weight.dtype)
                original_XS = original.head(states_XD).float().log_softmax(-1)
                kl_X = (original_XS.exp() * (original_XS - log_XS)).sum(-1)
                kl_BT[b, rows_X] = kl_X.double().cpu()
                agrees_BT[b, rows_X] = (original_XS.argmax(-1) == log_XS.argmax(-1)).double().cpu()
        advance()
    return BlockScores(nll_BT) if original is None else BlockScores(nll_BT, kl_BT, agrees_BT)


def summarise(scores: BlockScores, original: BlockScores | None) -> dict[str, Any]:
    """What the JSON says of a model and a text; standard errors are over blocks.

    Args:
        original: of the first model, where this is another one that reads the same ids.
    """
    nll_B = scores.nll_BT.mean(1)
    nll, stderr = mean_of(nll_B)
    summary: dict[str, Any] = {
        "value": exp(nll),
        "tokens": scores.nll_BT.numel(),
        "block": scores.nll_BT.shape[1] + 1,
        "blocks": len(nll_B),
        "nll": nll,
        "nll_stderr": stderr,
    }
    if scores.kl_BT is not None and scores.agrees_BT is not None:
        summary["kl"], summary["kl_stderr"] = mean_of(scores.kl_BT.mean(1))
        agreement = mean_of(scores.agrees_BT.mean(1))
        summary["top1_agreement"], summary["top1_agreement_stderr"] = agreement
    if original is not None:
        found = difference(nll_B, original.nll_BT.mean(1))
        summary["difference"] = {
            "nll": found["value"],
            "nll_stderr": found["stderr"],
            "perplexity_ratio": exp(found["value"]),
        }
    summary["by_position"] = _by_position(scores)
    return summary


def _by_position(scores: BlockScores) -> list[dict[str, Any]]:
    rows = []
    for start in range(0, scores.nll_BT.shape[1], POSITIONS):
        nll_BX = scores.nll_BT[:, start : start + POSITIONS]
        row: dict[str, Any] = {"start": start, "end": start + nll_BX.shape[1]}
        row |= {"value": exp(nll_BX.mean().item()), "tokens": nll_BX.numel()}
        row["nll_stderr"] = mean_of(nll_BX.mean(1)).stderr
        if scores.kl_BT is not None:
            row["kl"] = scores.kl_BT[:, start : start + POSITIONS].mean().item()
        rows.append(row)
    return rows
