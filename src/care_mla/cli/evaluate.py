"""`care evaluate MODEL [MODEL …]`: what several models can do and what they cache, in one run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from care_mla import console
from care_mla.cli.options import parse
from care_mla.cli.result import finish
from care_mla.evaluate_config import EvaluateConfig


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    start = time.perf_counter()
    config = parse(EvaluateConfig, "evaluate", arguments)
    from care_mla.evaluate.run import evaluate

    body = evaluate(config)
    print_models(body)
    finish(config, "evaluate", start, body)
    return 0


def print_models(body: dict[str, Any]) -> None:
    """Print one column per model, one row per measure; ± is a standard error."""
    models = body["models"]
    names = [Path(model["model"]).name or model["model"] for model in models]
    if len(set(names)) < len(names):
        names = [model["model"] for model in models]
    rows = [
        ["cached values per token and layer", *[_number(model["cached_values"]) for model in models]],
        ["cache, bytes per token", *[f"{model['cache_bytes_per_token']:,}" for model in models]],
    ]
    for stem in models[0]["perplexity"]:
        rows += _text_rows(stem, [model["perplexity"][stem] for model in models])
    for name in models[0]["tasks"]:
        rows += _task_rows(name, [model["tasks"][name] for model in models])
    for kind in ("needle", "passkey"):
        rows += _search_rows(kind, [model[kind] for model in models])
    for stage in ("prefill", "decode"):
        key = f"{stage}_tokens_per_second"
        rows.append([f"{stage}, tokens per second", *[_number(model["speed"][key]) for model in models]])
    console.current().table("Evaluated (± standard error)", ["", *names], rows)


def _text_rows(stem: str, found: list[dict[str, Any]]) -> list[list[str]]:
    rows = [
        [f"{stem}: perplexity, blocks of {found[0]['block']:,}", *[_number(each["value"]) for each in found]],
        [f"{stem}: perplexity by word", *[_number(each["word_level"]["word_perplexity"]) for each in found]],
    ]
    positions = found[0]["by_position"]
    for i, row in enumerate(positions if len(positions) > 1 else []):
        values = [_number(each["by_position"][i]["value"]) for each in found]
        rows.append([f"{stem}: perplexity at {row['start']:,} to {row['end']:,}", *values])
    if len(found) > 1:
        rows += [
            [f"{stem}: nats per token, to the original", *[_difference(each, "nll") for each in found]],
            [f"{stem}: KL(original || model)", *[_with_error(each, "kl") for each in found]],
            [f"{stem}: same likeliest token", *[_with_error(each, "top1_agreement") for each in found]],
        ]
    return rows


def _task_rows(name: str, found: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for metric in ("acc", "acc_norm"):
        if metric in found[0]:
            title = f"{name}: {metric} of {found[0]['items']:,} (chance {found[0]['chance']:.2f})"
            rows.append([title, *[_with_error(each, metric) for each in found]])
            if len(found) > 1:
                cells = [_signed((each.get("difference") or {}).get(metric)) for each in found]
                rows.append([f"{name}: {metric}, to the original", *cells])
    return rows


def _search_rows(kind: str, found: list[dict[str, Any] | None]) -> list[list[str]]:
    measured = [each for each in found if each is not None]
    if not measured:
        return []
    rows = [[f"{kind}: found", *[_with_error(each, "mean") for each in measured]]]
    for i, length in enumerate(measured[0]["lengths"]):
        cells = []
        for each in measured:
            row = each["found"][i] if i < len(each["lengths"]) else []
            cells.append(f"{sum(row)} of {sum(each['trials'][i])}" if row else "-")
        rows.append([f"{kind}: at {length:,} tokens", *cells])
    if len(measured) > 1:
        rows.append([f"{kind}: found, to the original", *[_signed(e.get("difference")) for e in measured]])
    return rows


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if value < 10_000 else f"{value:,.0f}"


def _with_error(found: dict[str, Any], key: str) -> str:
    value, error = found.get(key), found.get(f"{key}_stderr")
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _difference(found: dict[str, Any], key: str) -> str:
    change = found.get("difference")
    return _signed(change and {"value": change[key], "stderr": change[f"{key}_stderr"]})


def _signed(change: dict[str, Any] | None) -> str:
    if change is None:
        return "-"
    error = change["stderr"]
    return f"{change['value']:+.4f}" + (f" ± {error:.4f}" if error is not None else "")
