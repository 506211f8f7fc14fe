"""`care evaluate MODEL [MODEL …]`: perplexity and cache of several models in one run."""

from __future__ import annotations

import time
from typing import Any

from care_mla import console
from care_mla.cli.options import parse
from care_mla.cli.result import finish
from care_mla.configs import EvaluateConfig


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    start = time.perf_counter()
    config = parse(EvaluateConfig, "evaluate", arguments)
    from care_mla.evaluate.perplexity import evaluate

    body = evaluate(config)
    print_models(body)
    finish(config, "evaluate", start, body)
    return 0


def print_models(body: dict[str, Any]) -> None:
    """Print one row per model: its cache and its perplexity on every text."""
    models = body["models"]
    stems = list(models[0]["perplexity"])
    columns = ["model", "cached values", "cache bytes per token", *[f"perplexity {stem}" for stem in stems]]
    rows = [
        [
            model["model"],
            model["cached_values"],
            model["cache_bytes_per_token"],
            *[model["perplexity"][stem]["value"] for stem in stems],
        ]
        for model in models
    ]
    console.current().table("Evaluated", columns, rows)
