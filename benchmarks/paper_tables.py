"""Tables of the runs in paper.py: one thing varied at a time."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

HERE = Path(__file__).parent
BUDGETS = ("0.75", "0.5", "0.25", "0.125")
ALLOCATIONS = ("uniform", "care-eq1", "care-code", "greedy")


def results(pattern: str) -> dict[str, dict[str, Any]]:
    """Results that match, by name without suffix; in the order of their names."""
    paths = sorted(HERE.glob(pattern))
    return {path.name.removesuffix(".json"): json.loads(path.read_text(encoding="utf-8")) for path in paths}


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def perplexity(value: float) -> str:
    """Two decimals, or none where they say nothing."""
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def spread(values: list[float]) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def of(result: dict[str, Any], method: str, form: str = "exact-rope") -> dict[str, Any]:
    """The row of a method."""
    (row,) = [row for row in result["rows"] if (row["method"], row["form"]) == (method, form)]
    return row


def by_cache() -> str:
    """Perplexity as a ratio to the original's at every budget of one-shot; mean of the seeds."""
    shown = (("fisher", "joint", "care-u", "care-e"), ("fisher", "joint", "transmla", "care-u", "care-e"))
    rows = []
    for form, methods in zip(("exact-rope", "decoupled"), shown, strict=True):
        for method in methods:
            cells = []
            for budget in BUDGETS:
                runs = results(f"one-shot/compare-{budget}-seed*.json").values()
                ratios = [of(run, method, form)["perplexity"] / run["original"]["perplexity"] for run in runs]
                cells.append(f"{mean(ratios):.2f}")
            rows.append([f"`{method}`", form, *cells])
    return markdown(["method", "form", *[f"{float(budget):.3g}" for budget in BUDGETS]], rows)


def allocation() -> str:
    """Perplexity by how ranks are spread over layers, at the same number of cached values."""
    found = results("allocation/*.json")
    rows = []
    for budget in ("0.5", "0.25"):
        for method in ("care-u", "fisher"):
            cells = [of(found[f"{budget}-{name}"], method) for name in ALLOCATIONS]
            (values,) = {row["cached_values"] for row in cells}
            rows.append([str(values), f"`{method}`", *[perplexity(row["perplexity"]) for row in cells]])
    columns = ["cached values", "method", "uniform", "equation (1)", "published code", "greedy"]
    return markdown(columns, rows)


def ranks() -> str:
    """Smallest and largest rank of a layer under each allocation at half of the cache."""
    found = results("allocation/0.5-*.json")
    rows = []
    for method in ("care-u", "fisher"):
        cells = []
        for name in ALLOCATIONS:
            rank = of(found[f"0.5-{name}"], method)["kv_lora_rank"]
            cells.append(f"{min(rank)} to {max(rank)}" if isinstance(rank, list) else str(rank))
        rows.append([f"`{method}`", *cells])
    return markdown(["method", "uniform", "equation (1)", "published code", "greedy"], rows)


def square_root() -> str:
    """CARE with the square root of C and without, over the budgets and seeds of one-shot."""
    rows = []
    for form in ("exact-rope", "decoupled"):
        for budget in BUDGETS:
            found = list(results(f"one-shot/compare-{budget}-seed*.json").values())
            if found:
                cells = [
                    spread([of(run, method, form)["perplexity"] for run in found])
                    for method in ("care-u", "care-c")
                ]
                rows.append(
                    [form, str(of(found[0], "care-u", form)["cached_values"]), *cells, f"{len(found)}"]
                )
    return markdown(["form", "cached values", "sqrt(C): `care-u`", "C: `care-c`", "seeds"], rows)


def damping() -> str:
    """Perplexity by what is added to the diagonal of C."""
    found = [*results("covariance/damping-*.json").values(), *results("allocation/0.5-uniform.json").values()]
    found.sort(key=lambda run: run["calibration"]["damping"])
    rows = [
        [
            f"{run['calibration']['damping']:g}",
            *[perplexity(of(run, method)["perplexity"]) for method in ("care-u", "fisher")],
        ]
        for run in found
    ]
    return markdown(["damping", "`care-u`", "`fisher`"], rows)


def calibration() -> str:
    """Perplexity by text, number of tokens and length of a sequence."""
    rows = []
    found = results("calibration/*.json")
    (found["self-"],) = results("allocation/0.5-uniform.json").values()
    for name, run in sorted(
        found.items(),
        key=lambda item: (
            item[1]["calibration"]["sequence_length"],
            item[1]["calibration"]["tokens"],
            item[0],
        ),
    ):
        used = run["calibration"]
        cells = [of(run, method) for method in ("care-u", "fisher")]
        rows.append(
            [
                name.rpartition("-")[0].replace("+", " + "),
                f"{used['tokens']:,}",
                f"{used['sequence_length']:,}",
                *[perplexity(row["perplexity"]) for row in cells],
                *[f"{row['kl']:.3f}" for row in cells],
            ]
        )
    columns = [
        "text",
        "tokens",
        "tokens of a sequence",
        "`care-u`",
        "`fisher`",
        "KL of `care-u`",
        "of `fisher`",
    ]
    return markdown(columns, rows)


def table_1() -> str:
    """The paper's one-shot protocol on the demo model, at the shares of ranks that it has."""
    halves, quarters = (
        [row for run in results(f"paper-table-1/*-{budget}.json").values() for row in run["rows"]]
        for budget in ("0.5", "0.25")
    )
    original = results("paper-table-1/exact-rope-0.5.json")["exact-rope-0.5"]["original"]
    rows = [["original", "-", *[f"{original['perplexity']:.2f}"] * 2]]
    for half in sorted(halves, key=lambda row: row["perplexity"]):
        (quarter,) = [row for row in quarters if row["method"] == half["method"]]
        rows.append(
            [f"`{half['method']}`", half["form"], *[perplexity(row["perplexity"]) for row in (half, quarter)]]
        )
    return markdown(["method", "form", "half of the cache", "a quarter"], rows)


def tasks() -> str:
    """Accuracies of the original and of converted models, in the order of the run."""
    (result,) = results("paper-table-1/tasks.json").values()
    names = list(result["models"][0]["tasks"])
    rows = []
    for model in result["models"]:
        cells = [model["tasks"][name] for name in names]
        rows.append(
            [
                "original" if model["model"] == "demo" else f"`{Path(model['model']).name}`",
                *[f"{cell['acc']:.2f} ± {cell['acc_stderr']:.2f}" for cell in cells],
                f"{mean(cell['acc'] for cell in cells):.3f}",
            ]
        )
    chances = [result["models"][0]["tasks"][name]["chance"] for name in names]
    rows.append(["chance", *[f"{chance:.2f}" for chance in chances], f"{mean(chances):.3f}"])
    return markdown(["", *names, "mean"], rows)


PAPER_TABLES = {
    "by-cache": by_cache,
    "allocation": allocation,
    "ranks": ranks,
    "square-root": square_root,
    "damping": damping,
    "calibration": calibration,
    "paper-table-1": table_1,
    "paper-tasks": tasks,
}
