"""Makes the tables of benchmarks/*/README.md, and docs/models.md, from the JSON beside them.

`python benchmarks/tables.py` rewrites what lies between `<!-- table: NAME -->` and `<!-- end -->`; with
`--check` it only says whether that would change anything (exit code 1).
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from models_page import PAGE, models_page

HERE = Path(__file__).parent
MARKED = re.compile(r"(<!-- table: (?P<name>[^ ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(pattern: str) -> list[dict[str, Any]]:
    """All results that match, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob(pattern))]


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def spread(values: list[float]) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def one_shot(budget: str) -> str:
    """Every method at one budget: mean over seeds, best first."""
    runs = read(f"one-shot/compare-{budget}-seed*.json")
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        for row in run["rows"]:
            found[row["form"], row["method"]].append(
                {**row, "ratio": row["perplexity"] / run["original"]["perplexity"]}
            )
    original = runs[0]["original"]
    lines = [
        ["original", "-", str(original["cached_values"]), f"{original['perplexity']:.2f}", "1.00", "0", "-"]
    ]
    for (form, method), rows in sorted(
        found.items(), key=lambda item: mean(row["perplexity"] for row in item[1])
    ):
        chosen = sorted({f"P {row['qk_rope_head_dim']}" for row in rows if row["qk_rope_head_dim"]})
        lines.append(
            [
                f"`{method}`",
                form + (f", {' or '.join(chosen)}" if chosen else ""),
                f"{mean(row['cached_values'] for row in rows):g}",
                spread([row["perplexity"] for row in rows]),
                f"{mean(row['ratio'] for row in rows):.2f}",
                f"{mean(row['kl'] for row in rows):.3f}",
                str(len(rows)),
            ]
        )
    columns = ["method", "form", "cached values", "perplexity", "to the original", "KL", "seeds"]
    return markdown(columns, lines)


def headline() -> str:
    """The README's table: ours, the paper's and its baselines at half of the cache."""
    wanted = {
        ("exact-rope", "fisher"): "`fisher`, exact-rope (our own class)",
        ("decoupled", "fisher"): "**`fisher`, decoupled: 100 % MLA, stock engines**",
        ("exact-rope", "care-u"): "CARE, exact-rope",
        ("decoupled", "transmla"): "TransMLA, decoupled",
        ("decoupled", "care-u"): "CARE after TransMLA's RoPE split, decoupled",
        ("exact-rope", "svd"): "plain SVD, exact-rope",
    }
    runs = read("one-shot/compare-0.5-seed*.json")
    original = runs[0]["original"]
    lines = [["original", str(original["cached_values"]), f"{original['perplexity']:.1f}"]]
    for (form, method), name in wanted.items():
        rows = [row for run in runs for row in run["rows"] if (row["form"], row["method"]) == (form, method)]
        lines.append(
            [name, f"{rows[0]['cached_values']:g}", f"{mean(row['perplexity'] for row in rows):.1f}"]
        )
    return markdown(["one-shot, no training", "cached values", "perplexity"], lines)


def ablations() -> str:
    """What each part of the decoupled default contributes."""
    (result,) = read("one-shot/ablations.json")
    rows = [
        [
            row["part"],
            str(row["qk_rope_head_dim"]),
            str(row["kv_lora_rank"]),
            f"{row['perplexity']:.2f}",
            f"{row['kl']:.3f}",
        ]
        for row in result["rows"]
    ]
    return markdown(["switched off", "P", "R", "perplexity", "KL"], rows)


def convert() -> str:
    """Stages and memory of a conversion and of a second one on the same work folder."""
    first, second = read("convert/first.json")[0], read("convert/second-budget.json")[0]
    rows = [
        [stage, f"{first['stages'][stage]:.1f}", f"{second['stages'][stage]:.1f}"]
        for stage in first["stages"]
    ]
    rows.append(["whole command", f"{first['seconds']:.1f}", f"{second['seconds']:.1f}"])
    gib = [f"{run['peak_memory_bytes'] / 2**30:.2f} GiB" for run in (first, second)]
    return markdown(
        ["stage", "first conversion, seconds", "second budget, seconds"], [*rows, ["peak memory", *gib]]
    )


def long_blocks() -> str:
    """Methods in blocks of 2,048 tokens: beyond the length that calibration text of one document has."""
    (result,) = read("one-shot/compare-0.5-block2048-seed0.json")
    original = result["original"]["perplexity"]
    rows = [
        [f"`{row['method']}`", row["form"], f"{row['perplexity']:.2f}", f"{row['kl']:.3f}"]
        for row in sorted(result["rows"], key=lambda row: row["perplexity"])
    ]
    return markdown(
        ["method", "form", "perplexity", "KL"], [["original", "-", f"{original:.2f}", "0"], *rows]
    )


def published() -> str:
    """Methods at the settings of published code."""
    (result,) = read("one-shot/published.json")
    rows = [["original", "-", "-", f"{result['original']['perplexity']:.2f}"]]
    rows += [
        [
            f"`{row['method']}`",
            row["form"],
            str(row["qk_rope_head_dim"] or "-"),
            f"{row['perplexity']:.2f}",
        ]
        for row in result["rows"]
    ]
    return markdown(["method", "form", "P", "perplexity"], rows)


def llama_cpp() -> str:
    """A converted model in llama.cpp, by type of its weights."""
    (run,) = read("engines/llama_cpp.json")
    rows = [
        [
            f"`{row['quantization']}`",
            f"{row['bytes'] / 2**20:.0f}",
            f"{row['verify']['relative_error']:.2g}",
            f"{row['largest_token_error']:.2g}",
            f"{row['greedy_tokens_equal_to_transformers']} of {run['greedy_tokens']}",
            f"{row['perplexity']:.3f}",
            f"{row['verify']['cached_values']}",
        ]
        for row in run["rows"]
    ]
    columns = ["weights", "MiB", "error of logits", "of the worst token", "same text", "perplexity"]
    return markdown([*columns, "cached values"], rows)


def matching() -> str:
    """Perplexity before and after block matching, as a ratio to the original in the same run."""
    rows = []
    for run in read("healing/matching-*.json"):
        found, original = [run[name] for name in ("before", "after")], run["original"]["value"]
        rows.append(
            [
                run["form"] + (f", P {run['qk_rope_head_dim']}" if run["qk_rope_head_dim"] else ""),
                f"{run['cached_values']['converted']:g}",
                run["calibration"],
                str(run["match"]["steps"]),
                f"{run['match']['tokens']:,}",
                *(f"{row['value'] / original:.3f}" for row in found),
                *(f"{run['match']['held_out_kl'][name]:.3f}" for name in ("before", "after")),
                *(f"{run['cpu_seconds'][kind]:.0f}" for kind in ("without matching", "with matching")),
            ]
        )
    columns = ["form", "cached values", "text", "steps", "tokens", "before", "after"]
    columns += ["KL before", "KL after", "CPU seconds without matching", "with matching"]
    return markdown(columns, rows)


def matching_trials() -> str:
    """How block matching was set up: what was tried, on some of the layers."""
    (result,) = read("healing/trials.json")
    rows = [
        [
            row["layers"],
            f"{row['qk_rope_head_dim']} + {row['kv_lora_rank']}",
            "apart" if row["heads_apart"] else "together",
            row["optimizer"],
            row["loss"],
            f"{row['learning_rate']:g}" if row["learning_rate"] else "-",
            f"{row['beta2']:g}",
            f"{row['batch_tokens']:,}",
            f"{row['steps']:,}",
            f"{row['tokens']:,}",
            f"{row['stream_error']:.5f}" if row["stream_error"] else "-",
            f"{row['stream_log_error']:.5f}" if "stream_log_error" in row else "-",
            f"{row['perplexity_ratio']:.3f}" if row["perplexity_ratio"] else "-",
        ]
        for row in result["rows"]
    ]
    columns = [
        "layers",
        "P + R",
        "heads",
        "optimizer",
        "loss",
        "learning rate",
        "beta2",
        "batch",
        "steps",
        "tokens",
        "mean e after",
        "mean log(1 + e)",
    ]
    return markdown([*columns, "perplexity"], rows)


# Row, what it is, and what it must reach: ratios of perplexity on WikiText-2 and on Alpaca.
HEALING = {
    "parity-64-320": ("100 %, 64 + 320", 1.00, 1.00),
    "half-64-128": ("50 %, 64 + 128", 1.03, 1.01),
    "half-32-160": ("50 %, 32 + 160", 1.04, 1.01),
    "quarter": ("25 %, best P + R", 1.20, 1.05),
    "quarter-exact-rope": ("25 %, exact-rope", 1.08, 1.02),
    "eighth": ("12.5 %, best P + R", 1.60, 1.15),
}


def healing() -> str:
    """Every row of benchmarks/healing: one-shot and healed, beside what it must reach."""
    lines = []
    for name, (cache, *targets) in HEALING.items():
        goal = " / ".join(f"{target:.2f}" for target in targets)
        path = HERE / "healing" / name / "result.json"
        if not path.is_file():
            lines.append([cache, "-", "-", goal, "-", "-"])
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        original, *others = (list(model["perplexity"].values()) for model in result["models"])
        ratios = [
            " / ".join(
                f"{text['value'] / base['value']:.3f}" for text, base in zip(texts, original, strict=True)
            )
            for texts in others
        ]
        heal = result["heal"]
        minutes, use = heal["training_seconds"] / 60, heal["model_flop_utilisation"]
        speed = f"{heal['tokens_per_second']:,.0f}" + (f" ({use:.0%} of peak)" if use else "")
        lines.append([cache, *ratios, goal, f"{minutes:.1f}", speed])
    columns = ["cached values", "converted", "healed", "must reach", "minutes", "tokens per second"]
    return markdown(columns, lines)


TABLES = {
    "matching": matching,
    "matching-trials": matching_trials,
    "healing": healing,
    "llama-cpp": llama_cpp,
    "one-shot-0.5": lambda: one_shot("0.5"),
    "one-shot-0.25": lambda: one_shot("0.25"),
    "long-blocks": long_blocks,
    "published": published,
    "headline": headline,
    "ablations": ablations,
    "convert": convert,
}


def main() -> int:
    """Rewrite or check all tables; returns the exit code."""
    stale = []
    for path in [HERE.parent / "README.md", *sorted(HERE.glob("*/*.md"))]:
        text = path.read_text(encoding="utf-8")
        made = MARKED.sub(lambda found: found[1] + TABLES[found["name"]]() + found[3], text)
        if made != text:
            stale.append(str(path.relative_to(HERE.parent)))
            if "--check" not in sys.argv:
                path.write_text(made, encoding="utf-8")
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != models_page():
        stale.append(str(PAGE.relative_to(HERE.parent)))
        if "--check" not in sys.argv:
            PAGE.write_text(models_page(), encoding="utf-8")
    for name in stale:
        sys.stdout.write(f"{name}: {'differs from its JSON' if '--check' in sys.argv else 'rewritten'}\n")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
