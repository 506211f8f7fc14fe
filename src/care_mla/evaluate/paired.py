"""Means with their standard errors, and differences of two models on the same items."""
# Shapes: X items (blocks of text, questions, hidden numbers).

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Mean(NamedTuple):
    """A mean and its standard error, which one item does not have."""

    value: float
    stderr: float | None


def mean_of(values_X: Tensor) -> Mean:
    """Mean over items that are independent of each other, with the sample's standard error."""
    values_X = values_X.double()
    count = len(values_X)
    stderr = (values_X.std() / count**0.5).item() if count > 1 else None
    return Mean(values_X.mean().item(), stderr)


def difference(values_X: Tensor, original_X: Tensor) -> dict[str, Any]:
    """Mean of a model's values minus the original's on the same items.

    Its standard error is far smaller than that of either mean, since easy items are easy for both.
    """
    value, stderr = mean_of(values_X.double() - original_X.double())
    return {"value": value, "stderr": stderr}


def items(values: list[float]) -> Tensor:
    """Values of items as a tensor (X,)."""
    return torch.tensor(values, dtype=torch.float64)


def exp(value: float) -> float:
    """The exponential; infinite where it is too large for a float, as of a broken model's surprise."""
    return torch.tensor(value, dtype=torch.float64).exp().item()
