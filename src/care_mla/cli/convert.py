"""`care convert MODEL OUT`: the whole conversion, from the model's files to a checked folder."""

from __future__ import annotations

import time
from typing import Any

from care_mla import console
from care_mla.cli.options import parse
from care_mla.cli.result import finish
from care_mla.cli.verify import print_verdict
from care_mla.configs import ConvertConfig


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code: 3 where the written model fails its check."""
    start = time.perf_counter()
    config = parse(ConvertConfig, "convert", arguments)
    from care_mla.pipeline import convert

    body = convert(config)
    print_conversion(body)
    finish(config, "convert", start, body)
    return 0 if body["verify"]["passed"] else 3


def print_conversion(body: dict[str, Any]) -> None:
    """Print what a conversion gave: size of the cache, time by stage, the check, and where the result is."""
    terminal = console.current()
    values = body["cached_values"]
    rank = body["kv_lora_rank"]
    rows: list[list[object]] = [
        ["cached values per token and layer, original", values["original"]],
        ["cached values per token and layer, converted", values["converted"]],
        ["kv_lora_rank", f"{min(rank)} to {max(rank)}, by layer" if isinstance(rank, list) else rank],
        ["qk_rope_head_dim", body["qk_rope_head_dim"]],
        *[[f"held-out KL, RoPE table {table}", kl] for table, kl in (body["rope"]["kl"] or {}).items()],
        *[[f"held-out KL, biases: {option}", kl] for option, kl in (body["biases"]["kl"] or {}).items()],
        *[[f"runs in {name}", _verdict(said)] for name, said in body["engines"].items()],
        *[[f"seconds: {stage}", seconds] for stage, seconds in body["stages"].items()],
    ]
    terminal.table(f"Converted: {body['output']}", ["", "value"], rows)
    for reason in body["needs_healing"]:
        terminal.note(f"Needs healing: {reason}.")
    print_verdict(body["verify"])


def _verdict(said: bool | str) -> str:
    return "yes" if said is True else f"no: {said}"
