"""What block matching needs: memory, disk and operations. Arithmetic alone."""

from __future__ import annotations

from typing import NamedTuple

from care_mla.configs import PlanConfig
from care_mla.errors import OptionError
from care_mla.facts import ModelFacts

GIB = 2**30
MATCHING_BATCH_TOKENS = 512  # of a step of training, in whole sequences
# Text may come again: 576 steps on 49,152 tokens do nearly as well as on 98,304
# (benchmarks/healing/matching.md).
MOST_DISTINCT_TOKENS = 65_536
# Of the sequences, one in so many is held out from training: whether a layer is better is judged on those.
HELD_OUT_SHARE = 16


def matching_tokens(config: PlanConfig, tokens: int) -> int:
    """Tokens to match on: those asked for, else the statistics' `tokens`, or more if the steps take more."""
    taken = min(config.match_steps * MATCHING_BATCH_TOKENS, MOST_DISTINCT_TOKENS)
    return config.match_tokens or max(tokens, taken)


class MatchingCost(NamedTuple):
    """Bytes of memory, bytes on disk, and operations."""

    memory: int
    streams: int
    layers: int
    flops: float


def matching_cost(
    facts: ModelFacts,
    config: PlanConfig,
    *,
    tokens: int,
    original: int,
    converted: int,
    mlp: int,
) -> MatchingCost:
    """Cost of matching every layer.

    Args:
        tokens: that it trains on.
        original: weights of one layer's attention in the source; likewise `converted`, and of its MLP `mlp`,
            those that a token uses.

    Raises:
        OptionError: the two streams of all tokens do not stay within the spool budget.
    """
    # The next layer's input is written before this layer's is removed.
    stream = 4 * facts.hidden_size
    streams = 2 * 2 * stream * tokens
    if streams > config.max_spool_gib * GIB:
        most = int(config.max_spool_gib * GIB) // (4 * stream)
        instead = f"--match-tokens {most}, or " if most >= MATCHING_BATCH_TOKENS else ""
        raise OptionError(
            f"--max-spool-gib {config.max_spool_gib} does not hold the hidden states of {tokens:,} tokens at "
            "two layers, of the original and of the converted model, which --match-steps needs. Try "
            f"{instead}--max-spool-gib {-(-streams * 100 // GIB) / 100}"
        )
    batch_tokens = min(tokens, MATCHING_BATCH_TOKENS)
    # Forward and backward cost three times two operations per weight; what is matched costs one forward pass.
    step = 6.0 * batch_tokens * converted
    # Scores, probabilities and the gradient of one of them.
    attention = 3 * 4 * facts.num_attention_heads * batch_tokens**2
    sweep = tokens * 2.0 * (original + converted + 2 * mlp)
    return MatchingCost(
        # Weights, scales, moves, their gradients, Adam's two moments, and the weights moved.
        memory=4 * 7 * converted + attention + 4 * stream * tokens,
        streams=streams,
        layers=facts.num_hidden_layers * 4 * converted,
        flops=facts.num_hidden_layers * (config.match_steps * step + sweep),
    )
