"""What the page says first: what was converted, what it saves and costs, and whether its check passed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from care_mla.report.read import Result, Results
from care_mla.report.tables import number


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
    cached, verify = body["cached_values"], body.get("verify") or {}
    saved = 1 - cached["converted"] / cached["original"]
    pair = _measured_pair(result, results)
    name = body.get("model") or (pair[0]["model"] if pair else Path(body["output"]).name)
    what = (
        "Multi-head Latent Attention" if body["form"] == "decoupled" else f"latent attention ({body['form']})"
    )
    cost = f"KL to the original is {number(body.get('held_out_kl'))} nats per token on held-out text"
    tiles = [
        (f"{saved:.0%}".replace("%", " %"), f"of the KV cache saved: {number(cached['original'])} → "
         f"{number(cached['converted'])} values per token and layer", "")
    ]  # fmt: skip
    if pair is not None:
        stem, before = next(iter(pair[0]["perplexity"].items()), (None, None))
        if stem is not None and before is not None:
            after = pair[1]["perplexity"][stem]
            change = _percent(after["value"] / before["value"] - 1)
            cost = f"perplexity goes from {before['value']:.4g} to {after['value']:.4g} ({change})"
            tiles.append((change, f"perplexity: {before['value']:.4g} → {after['value']:.4g} on {stem}, "
                          f"{before['tokens']:,} tokens", ""))  # fmt: skip
    tiles.append(
        (f"{body.get('held_out_kl') or 0:.3f}", "nats per token from the original (KL, held-out text)", "")
    )
    check = ""
    if verify:
        passed = verify["passed"]
        tiles.append(("passed" if passed else "failed", f"check in {verify['engine']} against an independent "
                      f"reference: logits differ by {verify['relative_error']:.1g}",
                      "good" if passed else "bad"))  # fmt: skip
        check = f" Reloaded in {verify['engine']}, it {'passed' if passed else 'FAILED'} its check."
    sentence = (
        f"{name} turned into {what} caches {number(cached['converted'])} values per token and layer in place "
        f"of {number(cached['original'])}; {cost}.{check}"
    )
    if body.get("needs_healing"):
        sentence += f" It needs healing: {'; '.join(body['needs_healing'])}."
    return Verdict(title=f"{name} at {1 - saved:.0%} of its KV cache", sentence=sentence, tiles=tiles)


def _measured_pair(result: Result, results: Results) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """Original and converted model as `evaluate` measured them, where a file says so."""
    for evaluation in results.of("evaluate"):
        first, *others = evaluation.body["models"]
        for other in others:
            if other["model"] == result.body["output"] or (len(others) == 1 == len(results.of("convert"))):
                return first, other
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
    change = _percent(best["perplexity"] / original["perplexity"] - 1)
    share = best["cached_values"] / original["cached_values"]
    sentence = (
        f"Of {len(rows)} conversions at one budget and from one calibration, {best['method']} in the form "
        f"{best['form']} loses least: perplexity {original['perplexity']:.4g} becomes "
        f"{best['perplexity']:.4g} ({change}) at {share:.0%} of the cache."
    )
    of_original = f"perplexity of the original, {number(original['cached_values'])} cached values"
    of_best = f"{best['method']}, {best['form']}, {number(best['cached_values'])} cached values"
    tiles = [
        (f"{original['perplexity']:.4g}", of_original, ""),
        (f"{best['perplexity']:.4g}", of_best, ""),
    ]
    return Verdict(title="Methods side by side", sentence=sentence, tiles=tiles)


def _percent(share: float) -> str:
    return f"{100 * share:+,.1f} %".replace("-", "−")
