"""The pictures of a report: functions from JSON bodies to SVG text, or None where data are missing."""
# Shapes: L layers or lengths, F frequencies, D depths.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from care_mla.report.drawing import COLOURS, INK, MARKERS, drawing

Body = Mapping[str, Any]
# Perplexities above this many times the original's are outside of the picture.
WORST = 20


def pareto(comparisons: Sequence[Body]) -> str | None:
    """Perplexity over cached values: a curve for each method and form, over all budgets compared."""
    points: dict[str, list[tuple[float, float]]] = {}
    for body in comparisons:
        for row in body["rows"]:
            label = f"{row['method']}, {row['form']}"
            points.setdefault(label, []).append((row["cached_values"], row["perplexity"]))
    if not points:
        return None
    original = comparisons[0]["original"]
    best_first = sorted(points.items(), key=lambda item: min(perplexity for _, perplexity in item[1]))
    with drawing("pareto", title="Perplexity against cached values", height=4.4) as picture:
        axes = picture.axes
        for number, (label, pairs) in enumerate(best_first):
            place = number % len(COLOURS)
            style = "-" if number < len(COLOURS) else ":"
            axes.plot(
                *zip(*sorted(pairs), strict=True), style, marker=MARKERS[place], markersize=5, label=label
            )
        axes.axhline(original["perplexity"], color=INK, linewidth=0.8, linestyle="--")
        text = f"original: {original['perplexity']:.4g} with {original['cached_values']:,} values"
        axes.annotate(text, (0.01, original["perplexity"]), xycoords=("axes fraction", "data"), va="bottom")
        axes.set_yscale("log")
        # What is destroyed is in the table; here it would press all others together.
        worst = max(perplexity for pairs in points.values() for _, perplexity in pairs)
        axes.set_ylim(original["perplexity"] * 0.85, min(worst, original["perplexity"] * WORST) * 1.15)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter("{x:,.0f}")
        axes.set_xlabel("cached values per token and layer")
        axes.set_ylabel("perplexity")
        picture.figure.legend(loc="outside lower center", ncols=2)
    return picture.svg


def layer_errors(layers: Sequence[Body]) -> str | None:
    """What each layer's factors lose by the method's own measure, beside the rank that it has."""
    if any(row.get("predicted_error") is None for row in layers):
        return None
    numbers = range(len(layers))
    with drawing("errors", title="Predicted error by layer") as picture:
        picture.axes.bar(numbers, [row["predicted_error"] for row in layers], color=COLOURS[0])
        picture.axes.set_xlabel("layer")
        picture.axes.set_ylabel("predicted error of the factors")
        if len({row["rank"] for row in layers}) > 1:
            other = picture.axes.twinx()
            other.plot(numbers, [row["rank"] for row in layers], color=COLOURS[1], marker=".", label="rank")
            other.set_ylabel("rank")
            other.spines["right"].set_visible(True)
            picture.figure.legend(loc="outside lower center")
    return picture.svg


def rank_profile(layers: Sequence[Body]) -> str | None:
    """Ranks by layer: of the joint latent, or of keys and of values."""
    ranks = [row["ranks"] for row in layers if row.get("ranks")]
    if len(ranks) < len(layers) or len({tuple(each) for each in ranks}) < 2:
        return None
    names = ["latent"] if len(ranks[0]) == 1 else ["keys", "values"]
    with drawing("ranks", title="Rank by layer") as picture:
        for number, name in enumerate(names):
            picture.axes.step(range(len(ranks)), [each[number] for each in ranks], where="mid", label=name)
        picture.axes.set_xlabel("layer")
        picture.axes.set_ylabel("rank")
        picture.axes.set_ylim(bottom=0)
        picture.figure.legend(loc="outside lower center", ncols=2)
    return picture.svg


def spectra(layers: Sequence[Body]) -> str | None:
    """Singular values of each layer, largest first, and the rank that was kept."""
    if any(not row.get("spectrum") for row in layers):
        return None
    with drawing("spectra", title="Singular spectra by layer") as picture:
        for number, row in enumerate(layers):
            spectrum = row["spectrum"][0] if isinstance(row["spectrum"][0], list) else row["spectrum"]
            share = number / max(1, len(layers) - 1)
            alpha = 0.25 + 0.75 * share
            label = f"layer {number}" if number in (0, len(layers) - 1) else None
            picture.axes.plot(spectrum, color=COLOURS[0], alpha=alpha, linewidth=0.8, label=label)
        ranks = {row["rank"] for row in layers}
        if len(ranks) == 1:
            (rank,) = ranks
            picture.axes.axvline(rank, color=COLOURS[1], linewidth=1.2, label=f"rank {rank}")
        picture.axes.set_yscale("log")
        picture.axes.set_ylim(bottom=1e-6)
        picture.axes.set_xlabel("number of the singular value")
        picture.axes.set_ylabel("singular value")
        picture.figure.legend(loc="outside lower center", ncols=3)
    return picture.svg


def rotation(layers: Sequence[Body]) -> str | None:
    """|gamma| by layer and frequency: 1 where attention hardly sees a rotation, 0 where it needs RoPE."""
    gamma_LF = [row["gamma"] for row in layers if row.get("gamma")]
    if len(gamma_LF) < len(layers):
        return None
    with drawing(
        "gamma", title="Rotation that attention sees, by layer and frequency", height=3.6
    ) as picture:
        image = picture.axes.imshow(gamma_LF, aspect="auto", cmap="cividis", vmin=0, vmax=1)
        picture.axes.set_xlabel("frequency of RoPE, fastest first")
        picture.axes.set_ylabel("layer")
        bar = picture.figure.colorbar(image, ax=picture.axes)
        bar.set_label("|gamma|, mean over heads")
    return picture.svg


def matching(layers: Sequence[Body]) -> str | None:
    """Error of the stream after each layer, before and after block matching."""
    rows = [row.get("match") for row in layers]
    if not all(rows):
        return None
    with drawing("matching", title="Block matching by layer") as picture:
        for key, name in (("error_before", "before"), ("error_after", "after")):
            picture.axes.plot([row[key] for row in rows], marker=".", label=name)  # type: ignore[index]
        picture.axes.set_yscale("log")
        picture.axes.set_xlabel("layer")
        picture.axes.set_ylabel("error of the stream, held-out")
        picture.figure.legend(loc="outside lower center", ncols=2)
    return picture.svg


def needle(name: str, found: Body) -> str:
    """Share of hidden numbers found, by length of the text and depth in it."""
    score_LD = found["score"]
    title = f"{name}: share found by length and depth"
    with drawing(f"needle {name}", title=title, height=0.9 + 0.32 * len(found["depths"])) as picture:
        transposed = [list(column) for column in zip(*score_LD, strict=True)]
        image = picture.axes.imshow(transposed, aspect="auto", cmap="cividis", vmin=0, vmax=1)
        picture.axes.set_xticks(range(len(found["lengths"])), [f"{length:,}" for length in found["lengths"]])
        picture.axes.set_yticks(range(len(found["depths"])), [f"{depth:.0%}" for depth in found["depths"]])
        picture.axes.set_xlabel("tokens")
        picture.axes.set_ylabel("depth")
        for depth, row in enumerate(transposed):
            for length, share in enumerate(row):
                colour = "#ffffff" if share < 0.5 else "#111111"
                picture.axes.text(length, depth, f"{share:.0%}", ha="center", va="center", color=colour)
        picture.figure.colorbar(image, ax=picture.axes).set_label("share found")
    return picture.svg
