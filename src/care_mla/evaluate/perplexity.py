"""`care evaluate`: perplexity and live cache of several models in one run, the original first.

Perplexity by token blocks: no BOS is added, blocks of L tokens do not overlap, each predicts its L - 1 last
tokens from those before them, and the last partial block is left out.
"""
# Shapes: B blocks, L positions, S vocabulary, T predicted tokens of a block.

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from care_mla import console as terminal
from care_mla.calibrate.text import read_text_file
from care_mla.configs import EvaluateConfig
from care_mla.device import pick_device
from care_mla.errors import CalibrationError
from care_mla.evaluate.models import LoadedModel, live_cache, load

HEAD_ROWS = 512


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


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure every model on every text; the first one is the original that KL compares with."""
    config.check_paths()
    terminal.silence_transformers()
    console = terminal.current()
    device = pick_device(config.device)
    console.step(f"Loading {', '.join(config.models)}")
    models = [load(name, device=device, trust_remote_code=config.trust_remote_code) for name in config.models]
    rows: list[dict[str, Any]] = []
    for loaded in models:
        probe_1L = torch.arange(16, device=device)[None]
        values, nbytes = live_cache(loaded.model, probe_1L)
        rows.append(
            {
                "model": loaded.name,
                "cached_values": int(values) if float(values).is_integer() else values,
                "cache_bytes_per_token": nbytes,
                "perplexity": {},
            }
        )
    for path in config.perplexity:
        _measure_text(config, path, models, rows)
    return {"models": rows}


def _measure_text(
    config: EvaluateConfig, path: Path, models: list[LoadedModel], rows: list[dict[str, Any]]
) -> None:
    """Perplexity of all models on one text, and KL(original || model) where the vocabulary is the same."""
    tokens = [
        token_blocks(loaded.tokenizer, path, block=config.block, max_tokens=config.max_tokens)
        for loaded in models
    ]
    nll = [0.0] * len(models)
    kl = [0.0] * len(models)
    comparable = [torch.equal(tokens[0], each) for each in tokens]
    most = max(len(each) for each in tokens)
    with terminal.current().progress(f"Perplexity on {path.name}", most) as progress:
        for b in range(most):
            original_TS = None
            for i, loaded in enumerate(models):
                if b >= len(tokens[i]):
                    continue
                log_TS = log_probs(loaded.model, tokens[i][b])
                original_TS = log_TS if i == 0 else original_TS
                targets_T1 = tokens[i][b, 1:, None].to(log_TS.device)
                nll[i] -= log_TS.gather(1, targets_T1).double().sum().item()
                if i > 0 and comparable[i] and original_TS is not None:
                    for p_TS, q_TS in zip(original_TS.split(HEAD_ROWS), log_TS.split(HEAD_ROWS), strict=True):
                        kl[i] += (p_TS.exp() * (p_TS - q_TS)).sum().double().item()
            progress.advance()
    for i, row in enumerate(rows):
        counted = len(tokens[i]) * (config.block - 1)
        found: dict[str, Any] = {
            "value": torch.tensor(nll[i] / counted, dtype=torch.float64).exp().item(),
            "tokens": counted,
            "block": config.block,
        }
        if i > 0 and comparable[i]:
            found["kl"] = kl[i] / counted
        row["perplexity"][path.stem] = found
