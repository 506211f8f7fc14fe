"""A row of a benchmark: what was measured, its median, and how far the measurements lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any


def row(values: Sequence[float], *, unit: str, **what: Any) -> dict[str, Any]:
    """One row for JSON: `median`, `spread` (between the quartiles, in the same unit) and all values."""
    first, _, third = quantiles(values, n=4, method="inclusive") if len(values) > 1 else (0, 0, 0)
    return what | {"unit": unit, "median": median(values), "spread": third - first, "values": list(values)}


def add_ratios(rows: list[dict[str, Any]], first: str) -> None:
    """Give every row its ratio to the same row of the first model."""
    base: dict[tuple[Any, ...], float] = {}
    for each in rows:
        if each["model"] == first:
            base.setdefault(_key(each), each["median"])  # a model named twice is measured twice
    for each in rows:
        each["ratio"] = each["median"] / base[_key(each)]


def _key(each: dict[str, Any]) -> tuple[Any, ...]:
    return each["metric"], each.get("context")
