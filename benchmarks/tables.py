"""Makes tables and figures of the README, of docs and of benchmarks from JSON, and all of docs/models.md.

`python benchmarks/tables.py` rewrites what lies between `<!-- table: NAME -->` and `<!-- end -->`, and the
figures that figures.py knows; with `--check` it only says whether that would change anything (exit code 1).
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from figures import with_figures
from models_page import PAGE, models_page
from paper_tables import PAPER_TABLES, markdown, spread

HERE = Path(__file__).parent
MARKED = re.compile(r"(<!-- table: (?P<name>[^ ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(pattern: str) -> list[dict[str, Any]]:
    """All results that match, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob(pattern))]


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
        rows.append(
            [
                run["form"] + (f", P {run['qk_rope_head_dim']}" if run["qk_rope_head_dim"] else ""),
                str(run["cached_values"]),
                run["calibration"],
                str(run["match_steps"]),
                f"{run['match_tokens']:,}",
                *(
                    f"{run[name]['perplexity'] / run['original']['perplexity']:.3f}"
                    for name in ("before", "after")
                ),
                *(f"{run[name]['kl']:.3f}" for name in ("before", "after")),
                f"{run['cpu_seconds']:.0f}",
            ]
        )
    columns = ["form", "cached values", "text", "steps", "tokens", "before", "after", "KL before", "KL after"]
    return markdown([*columns, "CPU seconds of matching"], rows)


def matching_trials() -> str:
    """How block matching was set up: what was tried, on some of the layers."""
    (result,) = read("healing/trials.json")
    rows = [
        [
            row["layers"],
            f"{row['qk_rope_head_dim']} + {row['kv_lora_rank']}",
            row["optimizer"],
            row["loss"],
            f"{row['learning_rate']:g}" if row["learning_rate"] else "-",
            f"{row['beta2']:g}",
            f"{row['batch_tokens']:,}",
            f"{row['tokens']:,}",
            f"{row['stream_error']:.5f}",
            f"{row['perplexity_ratio']:.3f}" if row["perplexity_ratio"] else "-",
        ]
        for row in result["rows"]
    ]
    columns = [
        "layers",
        "P + R",
        "optimizer",
        "loss",
        "learning rate",
        "beta2",
        "batch",
        "tokens",
        "mean e after",
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
    """Every row of benchmarks/healing: one-shot and healed, beside what it must reach and whether it does."""
    (plain,) = read("healing/plain.json")
    lines = []
    for name, (cache, *targets) in HEALING.items():
        (result,) = read(f"healing/{name}/result.json")
        heal = result["heal"]
        if "models" in result:
            models = [[text["value"] for text in model["perplexity"].values()] for model in result["models"]]
            base, reached = models[0], models[-1]
            ratios = [_ratios(values, base) for values in models[1:]]
        else:  # not measured in its own run
            (other,) = read("healing/quarter/result.json")
            base = [text["value"] for text in other["models"][0]["perplexity"].values()]
            reached = list(plain["perplexity"][name].values())
            ratios = ["-", _ratios(reached, base) + " (plain)"]
        goal = " / ".join(
            f"{target:.2f} {'✓' if value / original <= target else '✗'}"
            for target, value, original in zip(targets, reached, base, strict=True)
        )
        tokens = heal["steps"][-1]["step"] * heal["tokens_per_step"] / 1e6
        minutes = heal["training_seconds"] / 60
        lines.append([cache, *ratios, goal, f"{tokens:.0f} M", f"{minutes:.1f}", heal["train"]])
    columns = ["cached values", "converted", "healed", "must reach", "tokens", "minutes", "trained"]
    return markdown(columns, lines)


def healed() -> str:
    """The README's table of healing: decoupled models, perplexity on the whole WikiText-2 test."""
    (plain,) = read("healing/plain.json")
    lines = []
    for name in ("half-32-160", "quarter", "eighth"):
        (result,) = read(f"healing/{name}/result.json")
        heal, cached = result["heal"], result["convert"]["cached_values"]
        tokens = heal["steps"][-1]["step"] * heal["tokens_per_step"] / 1e6
        if "models" in result:
            texts = [next(iter(model["perplexity"].values()))["value"] for model in result["models"]]
        else:
            texts = [None, None, plain["perplexity"][name]["wiki.test"]]
        if not lines:
            lines.append(["original", f"{cached['original']:g}", "", f"{texts[0]:.1f}"])
        shown = [f"{value:.1f}" if value else "-" for value in texts[1:]]
        lines.append([f"healed on {tokens:.0f} M tokens", f"{cached['converted']:g}", *shown])
    return markdown(["decoupled, stock engines", "cached values", "converted", "healed"], lines)


def _ratios(values: list[float], base: list[float]) -> str:
    return " / ".join(f"{value / original:.3f}" for value, original in zip(values, base, strict=True))


def healing_init() -> str:
    """The same healing from several initialisations."""
    (result,) = read("healing/init/init.json")
    lines = [
        [
            f"`{method}`",
            row["form"],
            *(f"{row['held_out'][when]:.3f}" for when in ("before", "after")),
            f"{row['measurements'][-1]['step'] * row['tokens_per_step'] / 1e6:.1f} M",
        ]
        for method, row in result["methods"].items()
    ]
    return markdown(["method", "form", "KL before", "KL after", "tokens"], lines)


def healing_probes() -> str:
    """What trains, and how fast: short trainings at a quarter of the cache."""
    (result,) = read("healing/probes.json")
    lines = [
        [
            row["train"],
            f"{row['learning_rate']:g}",
            f"{row['held_out']['after']:.3f}",
            f"{row['measurements'][-1]['step'] * row['tokens_per_step'] / 1e6:.1f} M",
        ]
        for row in result["rows"]
    ]
    return markdown(["trained", "learning rate", "KL after", "tokens"], lines)


TABLES = {
    "matching": matching,
    "matching-trials": matching_trials,
    "healing": healing,
    "healed": healed,
    "healing-init": healing_init,
    "healing-probes": healing_probes,
    "llama-cpp": llama_cpp,
    **PAPER_TABLES,
    "one-shot-0.75": lambda: one_shot("0.75"),
    "one-shot-0.125": lambda: one_shot("0.125"),
    "one-shot-0.5": lambda: one_shot("0.5"),
    "one-shot-0.25": lambda: one_shot("0.25"),
    "long-blocks": long_blocks,
    "published": published,
    "headline": headline,
    "ablations": ablations,
    "convert": convert,
}


def main() -> int:
    """Rewrite or check all tables and figures; returns the exit code."""
    stale = []
    root = HERE.parent
    for path in [root / "README.md", *sorted([*root.glob("docs/*.md"), *HERE.glob("**/*.md")])]:
        text = path.read_text(encoding="utf-8")
        made = with_figures(MARKED.sub(lambda found: found[1] + TABLES[found["name"]]() + found[3], text))
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
