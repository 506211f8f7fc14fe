"""Going on from prompts, one token at a time over the model's own cache; no generation settings take part."""
# Shapes: B prompts of one length, L positions, S vocabulary.

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from care_mla.calibrate.sample import cache_argument, draw

# From logits (B, S) of a step to the next ids (B,).
Pick = Callable[[Tensor], Tensor]


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    prompts_BL: Tensor,
    steps: int,
    *,
    pick: Pick | None = None,
    end: Iterable[int] = (),
    advance: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Token ids that follow each prompt: at most `steps`, up to and with the first of `end`.

    Args:
        prompts_BL: all of one length, so none is padded.
        pick: how the next token is chosen; None: the likeliest.
        end: ids that end a text.
        advance: called after each step.
    """
    pick = pick or (lambda logits_BS: logits_BS.argmax(-1))
    ends = set(end)
    cached = {cache_argument(model): DynamicCache(config=model.config)}
    tokens_BL = prompts_BL.to(next(model.parameters()).device)
    texts: list[list[int]] = [[] for _ in prompts_BL]
    going = set(range(len(texts)))
    for _ in range(steps):
        logits_BS = model(tokens_BL, use_cache=True, logits_to_keep=1, **cached).logits[:, -1]
        next_B = pick(logits_BS.float())
        for b in tuple(going):
            texts[b].append(int(next_B[b]))
            if texts[b][-1] in ends:
                going.remove(b)
        advance()
        if not going:
            break
        tokens_BL = next_B[:, None]
    return texts


def sampler(temperature: float, seed: int) -> Pick:
    """Draws by inverting the distribution at uniform numbers of a seed.

    Models that are given the same seed get the same numbers, so their answers part only where their
    distributions do.
    """
    generator = torch.Generator().manual_seed(seed)

    def pick(logits_BS: Tensor) -> Tensor:
        uniform_B = torch.rand(len(logits_BS), generator=generator, dtype=torch.float64)
        return draw((logits_BS / temperature).softmax(-1), uniform_B.to(logits_BS.device))

    return pick


def end_tokens(model: PreTrainedModel, eos_token_id: int | None) -> set[int]:
    """Ids that end a text: those of the model's generation settings, and the tokenizer's own."""
    settings = model.generation_config
    ids = settings.eos_token_id if settings is not None else None
    found = ids if isinstance(ids, list) else [ids]
    return {int(token) for token in (*found, eos_token_id) if token is not None}
