"""What the page says first: what was converted, what it saves and costs, and whether its check passed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from care_mla.report.read import Result, Results
from care_mla.report.tables import HARD, divergences, number, percent


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A sentence, and the same as figures: (value, what it is, good | bad | "")."""

    title: str
    sentence: str
    tiles: list[tuple[str, str, str]]


def verdicts(results: Results) -> list[Verdict]:
    """One for each conversion; without any, what the other results allow to say."""
    if conversions := results.of("convert"):
        return [_converted(result, results) for result in conversions]
    if evaluations := results.of("evaluate"):
        return [_evaluated(evaluations[0])]
    if comparisons := results.of("compare"):
        return [_compared(comparisons[0])]
    names = ", ".join(dict.fromkeys(f"care {result.command}" for result in results.all))
    return [Verdict(title="Results", sentence=f"What {names} found.", tiles=[])]


def _converted(result: Result, results: Results) -> Verdict:
    body = result.body
    cached = body["cached_values"]
    kept = cached["converted"] / cached["original"]
    pair = _measured_pair(result, results)
    name = body.get("model") or (pair[0]["model"] if pair else Path(body["output"]).name)
    what = (
        "Multi-head Latent Attention" if body["form"] == "decoupled" else f"latent attention ({body['form']})"
    )
    cost, cost_tiles = _cost(result, pair)
    check, check_tiles = _check(body.get("verify") or {})
    saved = (
        _share(1 - kept),
        f"of the KV cache saved: {number(cached['original'])} → {number(cached['converted'])} values per "
        "token and layer",
        "",
    )
    sentence = (
        f"{name} turned into {what} caches {number(cached['converted'])} values per token and layer in place "
        f"of {number(cached['original'])}; {cost}.{check}"
    )
    if body.get("needs_healing"):
        sentence += f" It needs healing: {'; '.join(body['needs_healing'])}."
    title = f"{name} at {_share(kept)} of its KV cache"
    return Verdict(title=title, sentence=sentence, tiles=[saved, *cost_tiles, *check_tiles])


def _cost(
    result: Result, pair: tuple[Mapping[str, Any], Mapping[str, Any]] | None
) -> tuple[str, list[tuple[str, str, str]]]:
    """What the conversion costs, in words and in figures: perplexity where it was measured, and KL."""
    said, tiles = "", []
    stem = next(iter(pair[0]["perplexity"]), None) if pair else None
    if pair and stem is not None:
        before, after = (model["perplexity"][stem] for model in pair)
        change = percent(after["value"] / before["value"] - 1)
        values = f"{number(before['value'])} → {number(after['value'])}"
        about = f"perplexity: {values} on {stem}, {before['tokens']:,} tokens"
        said = f"perplexity goes from {values.replace('→', 'to')} ({change})"
        tiles.append((change, about, ""))
    if known := divergences(result):
        text, kl = known[0]
        said = said or f"KL to the original is {number(kl)} nats per token of {text}"
        tiles.append((f"{kl:.3f}", f"nats per token of {text} from the original (KL)", ""))
    return said or "what that costs was not measured", tiles


def _check(verify: Mapping[str, Any]) -> tuple[str, list[tuple[str, str, str]]]:
    """Whether the written model computes what it should, in words and in figures."""
    if not verify:
        return " It was not checked.", [("not checked", "care verify tells whether it is whole", "bad")]
    passed, engine = verify["passed"], verify["engine"]
    about = (
        f"check in {engine} against an independent reference: logits differ by {verify['relative_error']:.1g}"
    )
    tile = ("passed" if passed else "failed", about, "good" if passed else "bad")
    return f" Reloaded in {engine}, it {'passed' if passed else 'FAILED'} its check.", [tile]


def _measured_pair(result: Result, results: Results) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """Original and converted model as `evaluate` measured them, if it was these and no others.

    The same folder has other paths in other working directories, so last parts of names are compared, and
    what is cached besides.
    """
    body = result.body
    for evaluation in results.of("evaluate"):
        original, *others = evaluation.body["models"]
        if original["cached_values"] != body["cached_values"]["original"]:
            continue
        for other in others:
            same_name = Path(other["model"]).name == Path(body["output"]).name
            if same_name and other["cached_values"] == body["cached_values"]["converted"]:
                return original, other
    return None


def _evaluated(result: Result) -> Verdict:
    models = result.body["models"]
    tiles = []
    for model in models:
        for stem, found in list(model["perplexity"].items())[:1]:
            about = (
                f"perplexity of {model['model']} on {stem}, {number(model['cached_values'])} cached values"
            )
            tiles.append((f"{found['value']:.4g}", about, ""))
    names = " and ".join(str(model["model"]) for model in models)
    return Verdict(title="Evaluation", sentence=f"{names}, measured in one run.", tiles=tiles)


def _compared(result: Result) -> Verdict:
    original, rows = result.body["original"], result.body["rows"]
    best = min(rows, key=lambda row: row["perplexity"])
    change = percent(best["perplexity"] / original["perplexity"] - 1)
    share = _share(best["cached_values"] / original["cached_values"])
    sentence = (
        f"Of {len(rows)} conversions at one budget and from one calibration, {best['method']} in the form "
        f"{best['form']} loses least: perplexity {original['perplexity']:.4g} becomes "
        f"{best['perplexity']:.4g} ({change}) at {share} of the cache."
    )
    of_original = f"perplexity of the original, {number(original['cached_values'])} cached values"
    of_best = f"{best['method']}, {best['form']}, {number(best['cached_values'])} cached values"
    tiles = [
        (f"{original['perplexity']:.4g}", of_original, ""),
        (f"{best['perplexity']:.4g}", of_best, ""),
    ]
    return Verdict(title="Methods side by side", sentence=sentence, tiles=tiles)


def _share(part: float) -> str:
    return f"{100 * part:.0f}{HARD}%"
