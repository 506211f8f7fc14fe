"""`care generate MODEL [MODEL …] PROMPT`: answers of several models side by side."""

from __future__ import annotations

import textwrap
import time
from typing import Any

from care_mla import console
from care_mla.cli.options import parse
from care_mla.cli.result import finish
from care_mla.evaluate_config import GenerateConfig

WIDTH = 100


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    start = time.perf_counter()
    config = parse(GenerateConfig, "generate", arguments)
    from care_mla.evaluate.side_by_side import generate

    body = generate(config)
    print_answers(body)
    finish(config, "generate", start, body)
    return 0


def print_answers(body: dict[str, Any]) -> None:
    """Print every answer; the token that parts it from the first one stands in [[double brackets]]."""
    terminal = console.current()
    first = body["models"][0]
    terminal.out(f"\n{body['prompt']}")
    for row in body["models"]:
        pieces, place = list(row["pieces"]), row.get("parts_at")
        if row["ended"]:
            pieces[-1] = ""
        terminal.out(f"\n{row['model']}{_note(row, first)}")
        if place is not None:
            pieces[place:] = [f"[[{_piece(row, place)}]]", *pieces[place + 1 :]]
        text = "".join(pieces).strip() or "(nothing)"
        for line in text.splitlines():
            terminal.out(textwrap.fill(line, WIDTH, initial_indent="    ", subsequent_indent="    "))


def _note(row: dict[str, Any], first: dict[str, Any]) -> str:
    if row is first:
        return ":"
    if not row["same_tokens"]:
        return " (another tokenizer, so tokens are not compared):"
    place = row["parts_at"]
    if place is None:
        return " (the same, token by token):"
    return f" (parts at token {place + 1}, where the first has {_piece(first, place)!r}):"


def _piece(row: dict[str, Any], place: int) -> str:
    """A token's text; of the one that ends an answer, and of none at all, what it means."""
    if place >= len(row["pieces"]) or (row["ended"] and place == len(row["pieces"]) - 1):
        return "(end)"
    return str(row["pieces"][place]).replace("\n", "\\n")
