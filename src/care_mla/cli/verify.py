"""`care verify MODEL`: reloads a converted model in a fresh process, against its stored reference."""

from __future__ import annotations

import time
from typing import Any

from care_mla import console
from care_mla.cli.options import parse
from care_mla.cli.result import finish
from care_mla.configs import VerifyConfig


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code: 3 where the model fails."""
    start = time.perf_counter()
    config = parse(VerifyConfig, "verify", arguments)
    from care_mla.export.verify import verify

    body = verify(config)
    print_verdict(body)
    finish(config, "verify", start, body)
    return 0 if body["passed"] else 3


def print_verdict(body: dict[str, Any]) -> None:
    """Print how far an engine is from the reference, and how far the converted model is from the original."""
    rows = [
        ["relative error of logits", body["relative_error"]],
        ["largest difference of a log probability", body["max_abs_logprob_difference"]],
        ["same greedy continuation", body["greedy_equal"]],
        ["cached values per token and layer", body["cached_values"]],
        ["KL to the original, nats per token", body["kl_to_original"]],
        ["passed", body["passed"]],
    ]
    console.current().table(f"Reloaded in {body['engine']}, against the reference", ["", "value"], rows)
