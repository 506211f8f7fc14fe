"""The tables of the report: results in, texts of cells out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from care_mla.report.read import Result, Results


@dataclass(frozen=True, kw_only=True)
class Table:
    """Texts in columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""

    @property
    def classes(self) -> list[str]:
        """Of each column: numbers are set to the right, and only long texts are broken into lines."""
        cells = [[row[i] for row in self.rows] for i in range(len(self.columns))]
        return [
            "number" if i and all(re.match(r"[+−–\d]", cell) for cell in column)
            else "long" if max(map(len, column)) > 18 else ""
            for i, column in enumerate(cells)
        ]  # fmt: skip


def number(value: Any) -> str:
    """A value as a reader wants it: four digits, thousands apart, yes or no."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
        case list():
            return f"{min(value)} to {max(value)}" if value else "–"
    return str(value)


def short_names(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Models by the last part of their paths, or by all of it where that is not enough."""
    names = [Path(model["model"]).name or model["model"] for model in models]
    return names if len(set(names)) == len(names) else [model["model"] for model in models]


def before_after(result: Result) -> Table:
    """What `evaluate` measured, a column for each model; the first is the original."""
    models = result.body["models"]
    rows = [
        ["cached values per token and layer", *[number(model["cached_values"]) for model in models]],
        ["cache, bytes per token", *[number(model["cache_bytes_per_token"]) for model in models]],
    ]
    for stem in models[0]["perplexity"]:
        rows += _text_rows(stem, [model["perplexity"][stem] for model in models])
    for task in models[0].get("tasks") or {}:
        rows += _task_rows(task, [model["tasks"][task] for model in models])
    for kind in ("needle", "passkey"):
        found = [model.get(kind) for model in models]
        if any(found):
            rows.append([f"{kind}: share found", *[_measured(each or {}, "mean") for each in found]])
    for stage in ("prefill", "decode"):
        speeds = [(model.get("speed") or {}).get(f"{stage}_tokens_per_second") for model in models]
        if any(speeds):
            rows.append([f"{stage}, tokens per second", *map(number, speeds)])
    return Table(columns=["", *short_names(models)], rows=rows)


def _text_rows(stem: str, found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    about = f"{found[0]['tokens']:,} tokens in blocks of {found[0]['block']:,}"
    rows = [[f"{stem}: perplexity ({about})", *[number(each["value"]) for each in found]]]
    if all("word_level" in each for each in found):
        words = [number(each["word_level"]["word_perplexity"]) for each in found]
        rows.append([f"{stem}: perplexity by word", *words])
    for key, title in (
        ("kl", "KL to the original, nats per token"),
        ("top1_agreement", "same likeliest token"),
    ):
        if any(each.get(key) is not None for each in found):
            rows.append([f"{stem}: {title}", *[_measured(each, key) for each in found]])
    return rows


def _task_rows(task: str, found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    for metric in ("acc", "acc_norm"):
        if metric in found[0]:
            title = f"{task}: {metric}, {found[0]['items']:,} items"
            rows.append([title, *[_measured(each, metric) for each in found]])
    return rows


def _measured(found: Mapping[str, Any], key: str) -> str:
    value, error = found.get(key), found.get(f"{key}_stderr")
    return number(value) + (f" ± {error:.2g}" if value is not None and error is not None else "")


def conversion(result: Result) -> Table:
    """Original and converted model, as the conversion itself knows them."""
    body = result.body
    cached = body["cached_values"]
    ranks = body["kv_lora_rank"]
    rows = [
        ["cached values per token and layer", number(cached["original"]), number(cached["converted"])],
        ["latent, values (kv_lora_rank)", "–", number(ranks)],
        ["RoPE key, values (qk_rope_head_dim)", "–", number(body["qk_rope_head_dim"])],
        ["KL to the original, held-out text, nats per token", "0", number(body.get("held_out_kl"))],
    ]
    verify = body.get("verify") or {}
    if "kl_to_original" in verify:
        rows.append(["the same on the tokens of its check", "0", number(verify["kl_to_original"])])
    return Table(columns=["", "original", "converted"], rows=rows)


def checks(results: Results) -> Table | None:
    """Every check of a written model against its independent reference."""
    rows = []
    for result in results.all:
        verify = result.body if result.command == "verify" else result.body.get("verify")
        if verify:
            rows.append(
                [
                    result.path.name,
                    f"{verify['engine']}: " + ("passed" if verify["passed"] else "FAILED"),
                    number(verify["relative_error"]),
                    number(verify["max_abs_logprob_difference"]),
                    number(verify["greedy_equal"]),
                    number(verify["cached_values"]),
                ]
            )
    columns = ["", "engine", "relative error of logits", "largest log probability difference",
               "same greedy text", "cached values"]  # fmt: skip
    return Table(title="Checks", columns=columns, rows=rows) if rows else None


def methods(rows: Sequence[Mapping[str, Any]], original: Mapping[str, Any]) -> Table:
    """All methods, best first within each size; of several seeds the mean, and from the best to the worst."""
    groups: dict[tuple[float, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["cached_values"], row["method"], row["form"]), []).append(row)
    several = any(len(group) > 1 for group in groups.values())
    cells = [
        ["original", "–", number(original["cached_values"]), number(original["perplexity"]), "1.00", "0"]
    ]
    means = {key: _mean(group, "perplexity") for key, group in groups.items()}
    for cached, method, form in sorted(groups, key=lambda key: (-key[0], means[key])):
        group, mean = groups[cached, method, form], means[cached, method, form]
        kls = [row["kl"] for row in group if row.get("kl") is not None]
        ratio = mean / original["perplexity"]
        cells.append(
            [
                method,
                form,
                number(cached),
                number(mean),
                f"{ratio:,.2f}",
                number(sum(kls) / len(kls) if kls else None),
            ]
        )
        if several:
            found = [row["perplexity"] for row in group]
            cells[-1].insert(4, f"{number(min(found))} to {number(max(found))}" if len(group) > 1 else "–")
    columns = ["method", "form", "cached values", "perplexity", "times the original's", "KL"]
    if several:
        columns.insert(4, "over seeds")
        cells[0].insert(4, "–")
    return Table(columns=columns, rows=cells)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def healing(result: Result) -> Table:
    """A training, before and after."""
    body = result.body
    rows = [["held-out KL to the original, nats per token", *_two(body["held_out"])]]
    if "held_out_cross_entropy" in body:
        rows.append(["held-out cross-entropy, nats per token", *_two(body["held_out_cross_entropy"])])
    return Table(columns=["", "before", "after"], rows=rows)


def _two(values: Mapping[str, Any]) -> list[str]:
    return [number(values["before"]), number(values["after"])]


def plain(body: Mapping[str, Any]) -> Table:
    """The single values of a result that has no picture of its own."""
    left_out = {"format", "versions", "seconds", "warnings"}
    rows = [
        [key.replace("_", " "), number(value)]
        for key, value in body.items()
        if key not in left_out and isinstance(value, str | int | float | bool)
    ]
    return Table(columns=["", "value"], rows=rows)


def row_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of a result under their own keys; what is itself a list or an object is left to the JSON."""
    keys = [key for key, value in rows[0].items() if not isinstance(value, list | dict)]
    cells = [[number(row.get(key)) for key in keys] for row in rows]
    return Table(columns=[key.replace("_", " ") for key in keys], rows=cells)


def sources(results: Results) -> Table:
    """Every file of the folder that this page was made of."""
    rows = []
    for result in results.all:
        seconds = result.body.get("seconds")
        made_by = ", ".join(
            f"{name} {value}" for name, value in result.body.get("versions", {}).items() if value
        )
        rows.append([result.path.name, f"care {result.command}", number(seconds), made_by])
    return Table(title="Results", columns=["file", "command", "seconds", "versions"], rows=rows)


def fingerprints(result: Result) -> Table | None:
    """Hashes of what a conversion depends on."""
    rows = [[name, value] for name, value in result.body.get("fingerprints", {}).items()]
    title = f"Hashes: {result.path.name}"
    return Table(title=title, columns=["of", "hash"], rows=rows) if rows else None


def stages(result: Result) -> Table | None:
    """Seconds of each stage of a conversion."""
    rows = [[name, number(seconds)] for name, seconds in (result.body.get("stages") or {}).items()]
    if peak := result.body.get("peak_memory_bytes"):
        rows.append(["peak memory, GiB", f"{peak / 2**30:.2f}"])
    return (
        Table(title=f"Seconds: {result.path.name}", columns=["stage", "seconds"], rows=rows) if rows else None
    )
