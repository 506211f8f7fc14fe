"""The tables of the report: results in, texts of cells out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from care_mla.report.read import Result, Results

HARD = "\u00a0"  # a space at which no line is broken


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
            "number" if i and all(re.match(r"[+−–∞\d]|NaN", cell) for cell in column)
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
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else f"{'−' if value < 0 else ''}∞"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        case list() if not all(isinstance(each, int | float) for each in value):
            return f"{len(value):,} values"
        case list():
            return f"{min(value)} to {max(value)}" if value else "–"
    return str(value)


def measured(value: float | None, error: float | None, *, sign: bool = False) -> str:
    """A value with its standard error, both to the error's second digit."""
    if value is None or not error or not 0 < error < math.inf:
        return number(value)
    digits = min(max(1 - math.floor(math.log10(error)), 0), 6)
    # The one place to break this on a narrow page is before the sign.
    return f"{value:{'+' if sign else ''},.{digits}f} ±{HARD}{error:.{digits}f}".replace("-", "−")


def percent(share: float, error: float | None = None) -> str:
    """A change, with its standard error."""
    if not math.isfinite(share):
        return number(share)
    shown = measured(100 * share, error and 100 * error, sign=True) if error else f"{100 * share:+,.1f}"
    return f"{shown}{HARD}%".replace("-", "−")


def short_names(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Models by the last part of their paths, or by all of it where that is not enough."""
    names = [Path(model["model"]).name or model["model"] for model in models]
    return names if len(set(names)) == len(names) else [model["model"] for model in models]


def before_after(result: Result) -> Table:
    """What `evaluate` measured: the original, then each model with what changed."""
    models = result.body["models"]
    cached, nbytes = ([model[key] for model in models] for key in ("cached_values", "cache_bytes_per_token"))
    rows = [
        _beside("cached values per token and layer", map(number, cached), _relative(cached)),
        _beside("cache, bytes per token", map(number, nbytes), _relative(nbytes)),
    ]
    for stem in models[0]["perplexity"]:
        rows += _text_rows(stem, [model["perplexity"][stem] for model in models])
    for task in models[0].get("tasks") or {}:
        rows += _task_rows(task, [model["tasks"][task] for model in models])
    for kind in ("needle", "passkey"):
        found = [model.get(kind) or {} for model in models]
        if any(found):
            shown = [measured(each.get("mean"), each.get("mean_stderr")) for each in found]
            rows.append(_beside(f"{kind}: share found", shown, _differences(found)))
    for stage in ("prefill", "decode"):
        key = f"{stage}_tokens_per_second"
        speeds = [model["speed"][key] for model in models if (model.get("speed") or {}).get(key)]
        if len(speeds) == len(models):
            rows.append(_beside(f"{stage}, tokens per second", map(number, speeds), _relative(speeds)))
    first, *others = short_names(models)
    return Table(columns=["", first, *[cell for name in others for cell in (name, "change")]], rows=rows)


def _beside(title: str, values: Iterable[str], changes: Iterable[str]) -> list[str]:
    """A row: the original's value, then each model's value and what changed."""
    first, *others = values
    return [title, first, *[cell for pair in zip(others, changes, strict=True) for cell in pair]]


def _relative(values: Sequence[float]) -> list[str]:
    first, *others = values
    return [percent(value / first - 1) if first else "–" for value in others]


def _differences(found: Sequence[Mapping[str, Any]], metric: str | None = None) -> list[str]:
    """Differences from the original on the same items."""
    changes = []
    for each in found[1:]:
        paired = each.get("difference") or {}
        paired = paired.get(metric) or {} if metric else paired
        value = paired.get("value")
        changes.append("–" if value is None else measured(value, paired.get("stderr"), sign=True))
    return changes


def _text_rows(stem: str, found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    about = f"{found[0]['tokens']:,} tokens in blocks of {found[0]['block']:,}"
    values = [each["value"] for each in found]
    # A difference of nats is a factor of perplexity; of small errors, the same share.
    ratios = [each.get("difference") or {} for each in found]
    changes = [
        percent(value / values[0] - 1, ratio.get("nll_stderr") and ratio["nll_stderr"] * value / values[0])
        for value, ratio in zip(values[1:], ratios[1:], strict=True)
    ]
    rows = [_beside(f"{stem}: perplexity ({about})", map(number, values), changes)]
    if all("word_level" in each for each in found):
        words = [each["word_level"]["word_perplexity"] for each in found]
        rows.append(_beside(f"{stem}: perplexity by word", map(number, words), _relative(words)))
    for key, title in (
        ("kl", "KL to the original, nats per token"),
        ("top1_agreement", "same likeliest token, share"),
    ):
        if any(each.get(key) is not None for each in found):
            shown = [measured(each.get(key), each.get(f"{key}_stderr")) for each in found]
            rows.append(_beside(f"{stem}: {title}", shown, ["–"] * (len(found) - 1)))
    return rows


def _task_rows(task: str, found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    chance = found[0].get("chance")
    guessing = f", guessing {chance:.2g}" if chance is not None else ""
    for metric in ("acc", "acc_norm"):
        if metric in found[0]:
            title = f"{task}: {metric} ({found[0]['items']:,} items{guessing})"
            shown = [measured(each.get(metric), each.get(f"{metric}_stderr")) for each in found]
            rows.append(_beside(title, shown, _differences(found, metric)))
    return rows


def conversion(result: Result) -> Table:
    """Original and converted model, as the conversion itself knows them."""
    cached = result.body["cached_values"]
    rows = [["cached values per token and layer", number(cached["original"]), number(cached["converted"])]]
    for title, kl in divergences(result):
        rows.append([f"KL to the original, nats per token of {title}", "0", number(kl)])
    return Table(columns=["", "original", "converted"], rows=rows)


def divergences(result: Result) -> list[tuple[str, float]]:
    """KL to the original that a conversion knows of, with the text that it was measured on."""
    verify = result.body.get("verify") or {}
    found = [("held-out text", result.body.get("held_out_kl")), ("its check", verify.get("kl_to_original"))]
    return [(title, kl) for title, kl in found if kl is not None]


def choices(result: Result) -> Table:
    """How a model was converted, and what loads it."""
    body = result.body
    keys = ("form", "method", "kv_lora_rank", "qk_rope_head_dim", "freqfold", "allocation", "profile")
    rows = [[key.replace("_", " "), number(body[key])] for key in keys if body.get(key) is not None]
    engines = body.get("engines") or {}
    if runs := [name for name, verdict in engines.items() if verdict is True]:
        rows.append(["loads in", ", ".join(runs)])
    rows += [[f"not in {name}", str(why)] for name, why in engines.items() if why is not True]
    return Table(columns=["", "chosen"], rows=rows)


def candidates(result: Result) -> Table | None:
    """What a conversion chose among, best first."""
    found = sorted(result.body.get("candidates") or [], key=lambda row: row["kl"])
    rows = [[row["candidate"], number(row["kl"]), number(row["chosen"])] for row in found]
    columns = ["candidate", "KL on held-out text", "chosen"]
    return Table(title="Chosen on held-out text", columns=columns, rows=rows) if rows else None


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
                    number(verify.get("max_abs_logprob_difference")),
                    number(verify.get("greedy_equal")),
                    number(verify.get("cached_values")),
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
                f"{ratio:,.2f}" if math.isfinite(ratio) else number(ratio),
                number(sum(kls) / len(kls) if kls else None),
            ]
        )
        if several:
            found = [row["perplexity"] for row in group]
            cells[-1].insert(
                4, f"{number(min(found))}{HARD}to{HARD}{number(max(found))}" if len(group) > 1 else "–"
            )
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
    rows = [
        [result.path.name, f"care {result.command}", number(result.body.get("seconds"))]
        for result in results.all
    ]
    return Table(title="Results", columns=["file", "command", "seconds"], rows=rows)


def versions(results: Results) -> Table:
    """Of the software that made them."""
    files: dict[str, list[str]] = {}
    for result in results.all:
        found = (result.body.get("versions") or {}).items()
        files.setdefault(", ".join(f"{name} {value}" for name, value in found if value), []).append(
            result.path.name
        )
    rows = [[text or "not told", ", ".join(names)] for text, names in files.items()]
    return Table(title="Versions", columns=["of", "files"], rows=rows)


def fingerprints(result: Result) -> Table | None:
    """Hashes of what a conversion depends on."""
    rows = [[name, value] for name, value in (result.body.get("fingerprints") or {}).items()]
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
