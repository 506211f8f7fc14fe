"""How a budget of ranks is spread over the layers.

Reads the spectra that `decompose` found (squared singular values: the loss that dropping each component
adds), returns one rank for each layer. Pure Python on lists: 80 layers of 2,048 components take less
than a second.
"""
# Shapes: K components of a layer's spectrum.

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from typing import assert_never

from torch import Tensor

from care_mla.configs import Allocation
from care_mla.errors import OptionError

# score(layer_idx, rank): how much the next step at this rank is worth.
Score = Callable[[int, int], float]


def allocate_ranks(
    allocation: Allocation, spectra: Sequence[Tensor], total: int, *, low: int, high: int, multiple: int = 1
) -> list[int]:
    """Ranks whose sum is exactly `total`.

    - uniform: the same rank everywhere.
    - greedy: the largest squared singular values of all layers together, which minimises the summed loss.
    - care-eq1: CARE's equation (1): one by one to the layer with the largest share of its remaining loss in
      the next component, sigma^2_(r+1) / sum over m > r of sigma^2_m.
    - care-code: that score times sqrt((L - l) / ((L + 1) / 2)) for the depth and divided by sqrt(r / low) for
      the rank, neither of which is in the paper: what the paper's official code does.

    Args:
        allocation: `auto` is the caller's choice between two of these, so not for here.
        spectra: one for each layer, the components in the order in which they are kept.
        total: the sum of all ranks.
        low: where every layer starts (uniform ignores it, and `high`).
        high: no layer gets more, nor more than it has components.
        multiple: every rank is a multiple of this.

    Raises:
        OptionError: the budget cannot be spent exactly within the bounds.
    """
    num_layers = len(spectra)
    if allocation == "uniform":
        rank = total // num_layers
        caps = [len(spectrum) for spectrum in spectra]
        if rank * num_layers != total or rank % multiple or not 0 < rank <= min(caps):
            raise OptionError(
                f"uniform allocation of {total} over {num_layers} layers: {total / num_layers:g} each is not "
                f"a multiple of {multiple} from 1 to {min(caps)}, the components of the smallest layer. "
                "Choose another --budget or --kv-lora-rank."
            )
        return [rank] * num_layers

    low = math.ceil(low / multiple) * multiple
    caps = [min(high, len(spectrum)) // multiple * multiple for spectrum in spectra]
    if total % multiple or not num_layers * low <= total <= sum(caps) or min(caps) < low:
        raise OptionError(
            f"{allocation} allocation of {total} over {num_layers} layers: with ranks that are multiples of "
            f"{multiple} from {low} to {min(caps)}..{max(caps)}, sums go from {num_layers * low} "
            f"to {sum(caps)}. Choose another --budget or --kv-lora-rank, or --allocation uniform."
        )
    squares = [spectrum.tolist() for spectrum in spectra]
    match allocation:
        case "greedy":
            return _climb(_loss_score(squares, multiple), caps, total, low, multiple)
        case "care-eq1":
            return _climb(_share_score(squares, multiple), caps, total, low, multiple)
        case "care-code":
            score = _official_score(_share_score(squares, multiple), num_layers, low)
            return _climb(score, caps, total, low, multiple, is_lowest_first=True)
        case "auto":
            raise AssertionError("auto is resolved by the caller, which can measure")
        case _:
            assert_never(allocation)


def _climb(
    score: Score, caps: Sequence[int], total: int, low: int, multiple: int, *, is_lowest_first: bool = False
) -> list[int]:
    """From `low` everywhere, step by step to the best score below its cap.

    Ties go to the lowest rank and then to the lowest layer, so that identical layers stay level; with
    `is_lowest_first` straight to the lowest layer.
    """
    ranks = [low] * len(caps)

    def entry(layer_idx: int) -> tuple[float, int, int]:
        return -score(layer_idx, ranks[layer_idx]), 0 if is_lowest_first else ranks[layer_idx], layer_idx

    # A step changes the score of its own layer alone, so each layer has one entry.
    heap = [entry(layer_idx) for layer_idx, cap in enumerate(caps) if cap > low]
    heapq.heapify(heap)
    for _ in range((total - low * len(caps)) // multiple):
        layer_idx = heap[0][2]
        ranks[layer_idx] += multiple
        if ranks[layer_idx] < caps[layer_idx]:
            heapq.heapreplace(heap, entry(layer_idx))
        else:
            heapq.heappop(heap)
    return ranks


def _loss_score(squares: Sequence[Sequence[float]], multiple: int) -> Score:
    return lambda layer_idx, rank: sum(squares[layer_idx][rank : rank + multiple])


def _share_score(squares: Sequence[Sequence[float]], multiple: int) -> Score:
    tails: list[list[float]] = []
    for layer_squares in squares:
        # Summed from the small end: total minus head would leave nothing but rounding late in the spectrum.
        tail = [0.0]
        for square in reversed(layer_squares):
            tail.append(tail[-1] + square)
        tails.append(tail[::-1])

    def score(layer_idx: int, rank: int) -> float:
        tail = tails[layer_idx][rank]
        return sum(squares[layer_idx][rank : rank + multiple]) / tail if tail > 0 else 0.0

    return score


def _official_score(share: Score, num_layers: int, low: int) -> Score:
    def score(layer_idx: int, rank: int) -> float:
        depth = math.sqrt((num_layers - layer_idx) / ((num_layers + 1) / 2))
        return share(layer_idx, rank) * depth / math.sqrt(max(rank, 1) / max(low, 1))

    return score
