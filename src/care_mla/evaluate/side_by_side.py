"""`care generate`: answers of several models to one prompt, and the token where each parts from the first's.

What the JSON holds: `prompt`, `chat_template` (whether one was used), `temperature`, `seed`, and in `models`
for each: `text`, `tokens` (ids), `pieces` (the text of each id), `ended` (whether the model ended its answer
itself), and, beside the original, `parts_at`: the index of the first token that differs, null where none does
or where the tokenizers differ (`same_tokens` false).
"""
# Shapes: L positions.

from __future__ import annotations

import gc
from itertools import zip_longest
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from care_mla import console as terminal
from care_mla.device import pick_device
from care_mla.errors import OptionError
from care_mla.evaluate.generation import continuations, end_tokens, sampler
from care_mla.evaluate.models import OpenedModel, open_model
from care_mla.evaluate_config import GenerateConfig


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Let every model answer; the first one is the original.

    Raises:
        CareError: a model cannot be opened, has no chat template, or the prompt does not fit its context.
    """
    config.check_paths()
    terminal.silence_transformers()
    device = pick_device(config.device)
    opened = [
        open_model(name, device=device, trust_remote_code=config.trust_remote_code) for name in config.models
    ]
    is_chat = _is_chat(config, opened)
    prompts = [_prompt_ids(config, model, is_chat) for model in opened]
    rows: list[dict[str, Any]] = []
    for model, prompt in zip(opened, prompts, strict=True):
        row = _answer(config, model, prompt)
        if rows:
            same = prompt == prompts[0]
            row["same_tokens"] = same
            row["parts_at"] = parting(rows[0]["tokens"], row["tokens"]) if same else None
        rows.append(row)
        gc.collect()
    return {
        "prompt": config.prompt,
        "chat_template": is_chat,
        "temperature": config.temperature,
        "seed": config.seed,
        "models": rows,
    }


def parting(first: list[int], other: list[int]) -> int | None:
    """Index of the first token that differs; None where the answers are the same to their ends."""
    for place, (a, b) in enumerate(zip_longest(first, other)):
        if a != b:
            return place
    return None


def _answer(config: GenerateConfig, opened: OpenedModel, prompt: list[int]) -> dict[str, Any]:
    console = terminal.current()
    console.step(f"Loading {opened.name}")
    model, tokenizer = opened.load(), opened.tokenizer
    ends = end_tokens(model, tokenizer.eos_token_id)
    pick = sampler(config.temperature, config.seed) if config.temperature else None
    with console.progress(f"{opened.name} answers", config.max_new_tokens) as progress:
        (ids,) = continuations(
            model,
            torch.tensor([prompt]),
            config.max_new_tokens,
            pick=pick,
            end=ends,
            advance=progress.advance,
        )
    ended = ids[-1] in ends
    tokens = ids[:-1] if ended else ids
    return {
        "model": opened.name,
        "text": tokenizer.decode(tokens),
        "tokens": ids,
        "pieces": _pieces(tokenizer, ids),
        "ended": ended,
    }


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Texts that add up to the whole: a character of several tokens belongs to the last of them."""
    pieces, before = [], ""
    for count in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:count]))
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}") if count < len(ids) else text
        pieces.append(whole[len(before) :])
        before = whole if len(whole) > len(before) else before
    return pieces


def _is_chat(config: GenerateConfig, opened: list[OpenedModel]) -> bool:
    if config.chat_template == "auto":
        return bool(opened[0].tokenizer.chat_template)
    for model in opened if config.chat_template == "on" else ():
        if not model.tokenizer.chat_template:
            raise OptionError(
                f"--chat-template on: {model.name} comes without a chat template, so it is not known how a "
                "chat looks to it. Leave the option out, or give the text itself: --chat-template off"
            )
    return config.chat_template == "on"


def _prompt_ids(config: GenerateConfig, model: OpenedModel, is_chat: bool) -> list[int]:
    if is_chat and model.tokenizer.chat_template:
        chat = [{"role": "user", "content": config.prompt}]
        text = str(model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        # The template writes special tokens itself.
        ids = list(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    else:
        ids = list(model.tokenizer(config.prompt, verbose=False)["input_ids"])
    if len(ids) + config.max_new_tokens > model.max_length:
        raise OptionError(
            f"The prompt has {len(ids)} tokens, and with {config.max_new_tokens} new ones it is longer than "
            f"the context of {model.name}, {model.max_length}. Shorten it, or lower --max-new-tokens."
        )
    return ids
