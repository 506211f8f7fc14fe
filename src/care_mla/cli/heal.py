"""`care heal MODEL OUT --teacher MODEL`: a converted model trained back towards its original."""

from __future__ import annotations

import time
from typing import Any

from care_mla import console
from care_mla.cli.options import parse
from care_mla.cli.result import finish
from care_mla.cli.verify import print_verdict
from care_mla.heal_config import HealConfig


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code: 3 where the written model fails its check."""
    start = time.perf_counter()
    config = parse(HealConfig, "heal", arguments)
    from care_mla.heal.run import heal_model

    body = heal_model(config)
    if body is None:  # of several processes, the first one speaks
        return 0
    if not config.plan:
        print_healing(body)
    finish(config, "heal", start, body)
    return 0 if config.plan or body["verify"]["passed"] else 3


def print_healing(body: dict[str, Any]) -> None:
    """Print what training gave: divergence on held-out text, speed, the check, and where the result is."""
    held_out, entropy = body["held_out"], body["held_out_cross_entropy"]
    rows = [
        ["held-out KL to the original, before", held_out["before"]],
        ["held-out KL to the original, after", held_out["after"]],
        ["held-out cross-entropy, before", entropy["before"]],
        ["held-out cross-entropy, after", entropy["after"]],
        ["steps", len(body["steps"])],
        ["best step", body["best_step"]],
        ["tokens per second, median", body["tokens_per_second"]],
        ["model-FLOP utilisation", body["model_flop_utilisation"]],
        ["seconds of training", body["training_seconds"]],
    ]
    console.current().table(f"Healed: {body['output']}", ["", "value"], rows)
    print_verdict(body["verify"])
