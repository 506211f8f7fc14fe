"""The parts of the page in their order; what the results do not tell is left out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from care_mla.report import figures, tables
from care_mla.report.figures import Svg
from care_mla.report.read import Result, Results
from care_mla.report.tables import Table

# Shown by their own sections; other commands' results are shown as tables of their values.
SHOWN = {"convert", "compare", "evaluate", "heal", "verify", "generate", "demo", "report"}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture, what it is called, and a sentence on how to read it."""

    title: str
    svg: Svg
    caption: str


@dataclass(frozen=True, kw_only=True)
class Quote:
    """A text as it is; `parted` is the rest of it that differs from the first one."""

    title: str
    text: str
    parted: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page: a line of text, then figures, tables, and texts as they are."""

    title: str
    text: str = ""
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    quotes: list[Quote] = field(default_factory=list)


def sections(results: Results) -> list[Section]:
    """Everything below the verdict."""
    evaluations, conversions = results.of("evaluate"), results.of("convert")
    found = list(_warnings(results))
    for result in evaluations:
        found += _evaluation(result, _suffix(result, evaluations))
    for result in conversions:
        found += _conversion(result, _suffix(result, conversions), is_measured=bool(evaluations))
    found += [*map(_answers, results.of("generate")), *_comparison(results.of("compare"))]
    for i, result in enumerate(conversions):
        found += _layers(f"convert{i}", result, _suffix(result, conversions))
    healings = results.of("heal")
    found += [_healing(f"heal{i}", result, _suffix(result, healings)) for i, result in enumerate(healings)]
    found += [_other(result) for result in results.all if result.command not in SHOWN]
    found.append(_origin(results))
    return found


def _suffix(result: Result, others: list[Result]) -> str:
    """Tells results of one command apart."""
    return f" ({result.name})" if len(others) > 1 else ""


def _warnings(results: Results) -> Iterator[Section]:
    """What the commands warned of, once each, with the files that say so."""
    files: dict[str, list[str]] = {}
    for result in results.all:
        for warning in result.body.get("warnings") or []:
            files.setdefault(warning, []).append(result.path.name)
    if files:
        quotes = [
            Quote(title=", ".join(dict.fromkeys(names)), text=warning) for warning, names in files.items()
        ]
        yield Section(title="Warnings", quotes=quotes)


def _evaluation(result: Result, suffix: str) -> Iterator[Section]:
    models = result.body["models"]
    names = tables.short_names(models)
    text = "Measured in one run, the original first. ± is a standard error; that of a change is of the same "
    text += "text or items in both models."
    yield Section(title=f"Before and after{suffix}", text=text, tables=[tables.before_after(result)])
    for kind, title in (("needle", "Needle in a haystack"), ("passkey", "Pass keys in short text")):
        if drawn := list(_searches(result.name, models, names, kind)):
            yield Section(title=f"{title}{suffix}", figures=drawn)
    if drawn := list(_position_figures(result.name, models, names)):
        yield Section(title=f"Perplexity by position{suffix}", figures=drawn)


def _searches(name: str, models: list[Mapping[str, Any]], names: list[str], kind: str) -> Iterator[Figure]:
    """A heat map for each model, side by side."""
    for i, (model, short) in enumerate(zip(models, names, strict=True)):
        if found := model.get(kind):
            svg = figures.heat_map(
                f"{name}-{kind}{i}",
                found["score"],
                across="where the number stands, % of the text",
                down="tokens",
                scale="share found",
                ticks_across=[f"{100 * depth:.0f}" for depth in found["depths"]],
                ticks_down=[f"{length:,}" for length in found["lengths"]],
                values=True,
            )
            caption = f"% of numbers repeated exactly, hidden in {found.get('haystack', 'a long text')}."
            yield Figure(title=short, svg=svg, caption=caption)


def _position_figures(name: str, models: list[Mapping[str, Any]], names: list[str]) -> Iterator[Figure]:
    for i, stem in enumerate(models[0]["perplexity"]):
        rows = {
            short: model["perplexity"][stem].get("by_position") or []
            for short, model in zip(names, models, strict=True)
        }
        if all(len(each) > 1 for each in rows.values()):
            yield Figure(
                title=stem,
                svg=figures.by_position(f"{name}-position{i}", rows),
                caption="A conversion that suits short texts alone rises to the right of its original.",
            )


def _conversion(result: Result, suffix: str, *, is_measured: bool) -> Iterator[Section]:
    if not is_measured:
        yield Section(title=f"Before and after{suffix}", tables=[tables.conversion(result)])
    shown = [tables.choices(result), tables.candidates(result)]
    yield Section(title=f"Conversion{suffix}", tables=[table for table in shown if table])


def _answers(result: Result) -> Section:
    models = result.body["models"]
    words = [re.findall(r"\S+\s*", model["text"]) for model in models]
    quotes = []
    for name, found in zip(tables.short_names(models), words, strict=True):
        pairs = zip(found, words[0], strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0].strip() == pair[1].strip(), pairs))
        quotes.append(Quote(title=name, text="".join(found[:same]), parted="".join(found[same:]).strip()))
    text = f"Asked: {result.body['prompt']}"
    if any(quote.parted for quote in quotes):
        text += " (Underlined: from where an answer parts from the first.)"
    return Section(title="Answers side by side", text=text, quotes=quotes)


def _comparison(comparisons: list[Result]) -> Iterator[Section]:
    """Comparisons on the same text with the same original are one picture; their budgets make its lines."""
    groups: dict[tuple[object, ...], list[Result]] = {}
    for result in comparisons:
        text = result.body["text"]
        original = result.body["original"]
        key = (text["name"], text["tokens"], text["block"], round(original["perplexity"], 4))
        groups.setdefault(key, []).append(result)
    for i, ((text, tokens, block, _), group) in enumerate(groups.items()):
        original = group[0].body["original"]
        rows = [row for result in group for row in result.body["rows"]]
        limit = figures.OFF_SCALE * original["perplexity"]
        forms = list(dict.fromkeys(row["form"] for row in rows))
        empty = forms if not math.isfinite(limit) else [
            f for f in forms if not any(r["perplexity"] <= limit for r in rows if r["form"] == f)
        ]  # fmt: skip
        drawn = [
            Figure(
                title=f"Form {form}",
                svg=figures.pareto(
                    f"compare{i}-{form}", [row for row in rows if row["form"] == form], original, rows
                ),
                caption="Lower is better; further left is smaller. The dashed level is the original; what "
                "has an arrow is above the picture. Bars, if any: from the best to the worst seed.",
            )
            for form in forms
            if form not in empty
        ]
        more = "".join(
            f" All perplexities of form {form} are above {limit:,.0f}, so it has no picture."
            for form in empty
            if math.isfinite(limit)
        )
        yield Section(
            title="Perplexity against cached values",
            text=f"Text: {text}, {tokens:,} tokens in blocks of {block:,}. Every method has the same "
            f"calibration, damping and cached values as the others in its run.{more}",
            figures=drawn,
            tables=[tables.methods(rows, original)],
        )


def _layers(name: str, result: Result, suffix: str) -> Iterator[Section]:
    layers = result.layers
    parts = ["K", "V"] if len(layers[0].ranks) == 2 and len(layers[0].spectra) == 2 else [""]
    drawn = [
        Figure(
            title="Error by layer",
            svg=figures.layer_errors(f"{name}-errors", layers),
            caption="What the factors lose of each layer's keys and values, in the method's own weights.",
        )
    ]
    for i, part in enumerate(parts):
        of = f" of {part}" if part else ""
        drawn += [
            Figure(
                title=f"Error by layer and rank{of}",
                svg=figures.error_by_rank(f"{name}-tails{i}", layers, i),
                caption="Every rank that could have been taken: the lighter, the less is lost.",
            ),
            Figure(
                title=f"Singular spectra{of}",
                svg=figures.spectra(f"{name}-spectra{i}", layers, i),
                caption="The steeper a curve falls, the less a small latent costs that layer.",
            ),
        ]
    drawn.insert(
        1,
        Figure(
            title="Ranks by layer",
            svg=figures.rank_profile(f"{name}-ranks", layers),
            caption="Values per token that each layer's latent caches, the RoPE key not counted.",
        ),
    )
    yield Section(title=f"Layers{suffix}", figures=drawn)
    yield from _rope(name, result, suffix)
    if all(layer.match is not None for layer in layers):
        match = result.body.get("match") or {}
        kl = match.get("held_out_kl")
        text = f"KL on held-out text: {kl['before']:.4g} before, {kl['after']:.4g} after." if kl else ""
        svg = figures.match_errors(f"{name}-match", layers)
        caption = "Squared error of the stream after each layer's attention, by the loss that trains it."
        figure = Figure(title="Error before and after", svg=svg, caption=caption)
        yield Section(title=f"Block matching{suffix}", text=text, figures=[figure])


def _rope(name: str, result: Result, suffix: str) -> Iterator[Section]:
    layers = result.layers
    drawn = [
        Figure(
            title="Mean rotation that heads see, |γ|",
            svg=figures.heat_map(
                f"{name}-gamma", [layer.gamma for layer in layers],
                across="RoPE frequency, fast to slow", down="layer", scale="mean |γ| of the heads",
            ),
            caption="1: rotation hardly moves within what a head attends to, and can go; 0: it matters most.",
        )
    ]  # fmt: skip
    if all(layer.rope_kept for layer in layers):
        drawn.append(
            Figure(
                title="RoPE that each head keeps",
                svg=figures.heat_map(
                    f"{name}-kept", [layer.rope_kept for layer in layers],
                    across="query head", down="layer", scale="share kept",
                ),
                caption="Share of what rotation changes in a head's logits that the one RoPE key carries.",
            )
        )  # fmt: skip
    yield Section(title=f"Rotary position embedding{suffix}", figures=drawn)


def _healing(name: str, result: Result, suffix: str) -> Section:
    figure = Figure(
        title="Learning curve",
        svg=figures.learning_curve(name, result.body),
        caption="KL to the original, on the text of every step and on held-out text.",
    )
    return Section(title=f"Healing{suffix}", figures=[figure], tables=[tables.healing(result)])


def _other(result: Result) -> Section:
    shown = [table for table in [tables.plain(result.body)] if table.rows]
    rows = result.body.get("rows")
    if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        shown.append(tables.row_table(rows))
    return Section(title=f"care {result.command}: {result.path.name}", tables=shown)


def _origin(results: Results) -> Section:
    shown = [tables.sources(results), tables.versions(results), tables.checks(results)]
    quotes = []
    for result in results.of("convert"):
        shown += [tables.fingerprints(result), tables.stages(result)]
        if recipe := result.body.get("recipe"):
            quotes.append(Quote(title=f"Recipe: {result.path.name}", text=recipe.strip()))
    text = "The same recipe with the same versions gives the same files."
    return Section(title="Recipe, versions, hashes", text=text, tables=[t for t in shown if t], quotes=quotes)
