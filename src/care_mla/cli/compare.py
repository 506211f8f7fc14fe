"""`care compare MODEL`: methods side by side at one budget, from one calibration, with the original."""

from __future__ import annotations

import time
from typing import Any

from care_mla import console
from care_mla.cli.options import parse
from care_mla.cli.result import finish
from care_mla.configs import CompareConfig


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    start = time.perf_counter()
    config = parse(CompareConfig, "compare", arguments)
    from care_mla.evaluate.compare import compare

    body = compare(config)
    _print(config.model, body)
    finish(config, "compare", start, body)
    return 0


def _print(model: str, body: dict[str, Any]) -> None:
    original = body["original"]
    rows: list[list[object]] = [
        ["original", "-", "-", "-", "-", original["cached_values"], original["perplexity"], 0.0, None]
    ]
    for row in sorted(body["rows"], key=lambda row: row["perplexity"]):
        rank = row["kv_lora_rank"]
        rows.append(
            [
                row["method"],
                row["form"],
                row["allocation"],
                f"{min(rank)}-{max(rank)}" if isinstance(rank, list) else rank,
                row["qk_rope_head_dim"],
                row["cached_values"],
                row["perplexity"],
                row["kl"],
                row["seconds"],
            ]
        )
    columns = ["method", "form", "allocation", "R", "P", "cached values", "perplexity", "KL", "seconds"]
    console.current().table(f"{model}, best first (R kv_lora_rank, P qk_rope_head_dim)", columns, rows)
