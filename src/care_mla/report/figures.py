"""The figures of the report: data in, SVG text out, drawn by matplotlib for use inside an HTML page.

Text stays text, in the page's own font. What must be legible on light and on dark paper has no colour of its
own but a CSS variable of the page (`--ink`, `--grid`, `--paper`, `--series-1` …); heat maps bring their
colours, in an order of brightness that all kinds of colour vision see. A figure is as wide as a telephone, so
that its text is never scaled below what can be read.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from care_mla.heal.curves import COLOURS as CURVE_COLOURS
from care_mla.heal.curves import healing_figure
from care_mla.report.read import Layer
from care_mla.report.tables import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What a figure function returns: trusted text, put into the page as it is.
Svg = str
WIDTH = 4.9  # inches; 353 px of a telephone's 390
INK, GRID, PAPER = "#111213", "#d1d2d3", "#f1f2f3"
# Okabe and Ito's colours; on the page they are variables, so that the dark ones are lighter on dark paper.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
VARIABLES = {INK: "--ink", GRID: "--grid", PAPER: "--paper", "#000000": "--ink", "#ffffff": "--paper"} | {
    colour: f"--series-{i}" for i, colour in enumerate(SERIES, 1)
}
DASHES = ("-", "--", ":")
# Times the original's perplexity: methods above are named at the top of the picture, so that those that keep
# the model usable can be told apart.
OFF_SCALE = 12
HEAT = "cividis"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with two dollars is no formula
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 9,
}
assert {colour.lower() for colour in CURVE_COLOURS[:6]} == set(SERIES), "the healing curve's are the page's"


@contextmanager
def _drawing(height: float) -> Iterator[tuple[Figure, Axes]]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, figure.add_subplot()


def _svg(name: str, figure: Figure) -> Svg:
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return inline(name, text.getvalue())


def inline(name: str, svg: str) -> Svg:
    """A file of matplotlib as a part of a page: no addresses, ids of its own, the page's colours and font.

    Args:
        name: begins the ids; names of files and forms go into it, and what is no id is spelt as one.
    """
    name = re.sub(r"[^A-Za-z0-9-]", lambda found: f"_{ord(found[0]):x}_", name)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(
        r"(font(?:-family)?: (?:[a-z0-9.]+ )*?(?:[\d.]+px )?)'DejaVu Sans'[^;\"]*", r"\1var(--sans)", svg
    )
    for colour, variable in VARIABLES.items():
        svg = re.sub(re.escape(colour), f"var({variable})", svg, flags=re.IGNORECASE)
    # Lines without a colour of their own are black in SVG.
    return re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" fill="var(--ink)" role="img">', svg, count=1
    )


def pareto(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    original: Mapping[str, Any],
    beside: Sequence[Mapping[str, Any]] = (),
) -> Svg:
    """Perplexity against cached values, a line for each method, with the original's as a level.

    Args:
        rows: with method, cached_values and perplexity; those of one method and size are seeds, shown as
            their mean, and from the least to the most as a bar.
        beside: the rows of all pictures that are to have the same scales, and the same style for a method.
    """
    beside = beside or rows
    level = original["perplexity"]
    lines = _lines(rows)
    styles = {method: i for i, method in enumerate(dict.fromkeys(row["method"] for row in beside))}
    shown = [row["perplexity"] for row in beside if row["perplexity"] <= OFF_SCALE * level]
    low, high = level / 1.25, max([*shown, 2 * level]) * 1.2
    sizes = sorted({row["cached_values"] for row in beside})
    left, right = sizes[0], sizes[-1]
    span = (right - left) or 0.2 * right
    labels: list[tuple[float, str, float | None]] = [(level, f"original {number(level)}", right)]
    above: list[tuple[float, str]] = []
    with _drawing(3.6) as (figure, axes):
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        axes.set_xlim(left - 0.12 * span, right + 0.95 * span)
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.hlines(level, left - 0.12 * span, right, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        for method, points in lines.items():
            _method_line(axes, points, styles[method])
            x, mean, *_ = points[-1]
            if mean <= high:
                labels.append((mean, f"{method} {number(mean)}", x))
            else:
                above.append((mean, f"{method} {number(mean)} ↑"))
        # Those above are at the top in their order.
        labels = [*sorted(labels), *((high, text, None) for _, text in sorted(above))]
        _labels(axes, right + 0.3 * span, labels)
        axes.set_xlabel(f"cached values per token and layer (original: {original['cached_values']:,})")
        axes.set_ylabel("perplexity")
        _plain_log_ticks(axes)
        return _svg(name, figure)


def _lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float, float, float]]]:
    """By method, for each size: cached values; mean, least and most of its perplexities."""
    groups: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        groups.setdefault(row["method"], {}).setdefault(row["cached_values"], []).append(row["perplexity"])
    return {
        method: [(x, sum(v) / len(v), min(v), max(v)) for x, v in sorted(sizes.items())]
        for method, sizes in groups.items()
    }


def _method_line(axes: Axes, points: Sequence[tuple[float, float, float, float]], style: int) -> None:
    drawn = [point for point in points if all(map(math.isfinite, point))]
    if not drawn:
        return
    x, y, low, high = zip(*drawn, strict=True)
    bars = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
    axes.errorbar(
        x, y, yerr=bars, color=SERIES[style % len(SERIES)], marker=MARKERS[style % len(MARKERS)],
        linestyle=DASHES[style // len(SERIES) % len(DASHES)], markersize=4.5, linewidth=1.2, elinewidth=1,
        capsize=2,
    )  # fmt: skip


def _labels(axes: Axes, x: float, labels: Sequence[tuple[float, str, float | None]]) -> None:
    """Names to the right of the points that they belong to, moved apart where they would cover each other.

    Args:
        labels: the point's y, its name, and its x, None for one that is not drawn; lowest first.
    """
    low, high = (math.log(limit) for limit in axes.get_ylim())
    step = (high - low) / max(14, len(labels))
    # The nearest places in the same order and a step apart: pool what would overlap around its mean.
    pools: list[list[float]] = []
    for i, (value, *_) in enumerate(labels):
        pools.append([math.log(value) - i * step])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    places = [_mean(pool) for pool in pools for _ in pool]
    highest = high - (len(labels) - 0.5) * step
    for i, ((value, text, from_x), place) in enumerate(zip(labels, places, strict=True)):
        place = math.exp(min(max(place, low + step / 2), highest) + i * step)
        if from_x is None:
            axes.text(x, place, text, va="center", fontsize=9)
            continue
        axes.annotate(
            text, (from_x, value), (x, place), va="center", fontsize=9, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": GRID, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4},
        )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _plain_log_ticks(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 5.0) if high / low < 200 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    # The usual powers of ten would be several pieces of text, which the page's own font moves apart.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5f}".rstrip("0").rstrip(".")))
    axes.yaxis.set_minor_formatter(NullFormatter())


def layer_errors(name: str, layers: Sequence[Layer]) -> Svg:
    """The share of squared output that each layer's factors lose."""
    with _drawing(2.5) as (figure, axes):
        errors = [100 * layer.predicted_error for layer in layers]
        axes.bar(range(len(layers)), errors, color=SERIES[0], width=0.75)
        axes.grid(visible=False, axis="x")
        worst = max(range(len(layers)), key=errors.__getitem__)
        axes.annotate(
            f"{errors[worst]:.3g} %", (worst, errors[worst]), xytext=(0, 2), textcoords="offset points",
            ha="center", fontsize=9,
        )  # fmt: skip
        axes.margins(y=0.15)
        axes.set_xlabel("layer")
        axes.set_ylabel("weighted error, % of the whole")
        return _svg(name, figure)


def rank_profile(name: str, layers: Sequence[Layer]) -> Svg:
    """Ranks by layer: of the joint latent, or of K and V."""
    titles = ["K", "V"] if len(layers[0].ranks) == 2 else ["K and V together"]
    with _drawing(2.3) as (figure, axes):
        for i, title in enumerate(titles):
            ranks = [layer.ranks[i] for layer in layers]
            axes.step(range(len(layers)), ranks, where="mid", color=SERIES[i], linewidth=1.6,
                      linestyle=("-", "--")[i], label=title)  # fmt: skip
        axes.set_ylim(0, 1.2 * max(max(layer.ranks) for layer in layers))
        axes.set_xlabel("layer")
        axes.set_ylabel("rank")
        axes.legend(loc="lower right", ncols=2)
        return _svg(name, figure)


def error_by_rank(name: str, layers: Sequence[Layer], part: int = 0) -> Svg:
    """What each layer would lose at each rank, by its spectrum, with the rank that was taken."""
    import numpy as np

    width = max(len(layer.spectra[part]) for layer in layers)
    lost_LR = np.full((len(layers), width), np.nan)
    for i, layer in enumerate(layers):
        spectrum = np.maximum(np.array(layer.spectra[part]), 0)
        tail = spectrum[::-1].cumsum()[::-1] / max(spectrum.sum(), 1e-300)
        # At rank r everything from the value of index r on is lost.
        lost_LR[i, : len(tail) - 1] = tail[1:]
    lost_LR = np.log10(np.clip(lost_LR, 1e-6, 1))
    with _drawing(3.0) as (figure, axes):
        image = axes.imshow(
            lost_LR, aspect="auto", interpolation="none", cmap=f"{HEAT}_r", vmin=-4, vmax=0,
            extent=(0.5, width + 0.5, len(layers) - 0.5, -0.5),
        )  # fmt: skip
        ranks = [layer.ranks[part] for layer in layers]
        edges = np.arange(len(layers) + 1) - 0.5
        axes.stairs(ranks, edges, orientation="horizontal", color="#ffa07a", linewidth=2, baseline=None)
        axes.grid(visible=False)
        axes.set_xlabel("rank (the line: what was taken)")
        axes.set_ylabel("layer")
        bar = figure.colorbar(image, ax=axes, label="share of the whole that is lost", pad=0.02)
        bar.set_ticks([0, -1, -2, -3, -4], labels=["100 %", "10 %", "1 %", "0.1 %", "0.01 %"])
        bar.outline.set_visible(False)
        return _svg(name, figure)


def spectra(name: str, layers: Sequence[Layer], part: int = 0, count: int = 6) -> Svg:
    """Singular values, the first as 1, of some layers from first to last, with the ranks that were taken."""
    chosen = sorted({round(i * (len(layers) - 1) / (count - 1)) for i in range(count)})
    with _drawing(3.0) as (figure, axes):
        axes.set_yscale("log")
        for i, idx in enumerate(chosen):
            spectrum = layers[idx].spectra[part]
            first = spectrum[0] or 1.0
            values = [math.sqrt(max(value / first, 1e-12)) for value in spectrum]
            colour = SERIES[i % len(SERIES)]
            axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=1.3, label=f"layer {idx}",
                      linestyle=("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))[i % 6])  # fmt: skip
            rank = layers[idx].ranks[part]
            axes.plot(rank, values[min(rank, len(values)) - 1], marker=MARKERS[i], color=colour, markersize=5)
        axes.set_ylim(1e-5, 1.5)
        _plain_log_ticks(axes)
        axes.set_xlabel("singular value, by size (marks: the rank taken)")
        axes.set_ylabel("relative to the largest")
        axes.legend(loc="lower left", ncols=2)
        return _svg(name, figure)


def heat_map(
    name: str,
    rows: Sequence[Sequence[float]],
    *,
    across: str,
    down: str,
    scale: str,
    ticks_across: Sequence[str] = (),
    ticks_down: Sequence[str] = (),
    values: bool = False,
) -> Svg:
    """Numbers from 0 to 1 as colours; `values` writes them into the cells too; no ticks: indices."""
    height = 1.2 + 0.32 * len(rows) if values else 3.0
    with _drawing(height) as (figure, axes):
        image = axes.imshow(rows, aspect="auto", interpolation="none", cmap=HEAT, vmin=0, vmax=1)
        axes.grid(visible=False)
        axes.set_xlabel(across)
        axes.set_ylabel(down)
        if ticks_across:
            axes.set_xticks(range(len(ticks_across)), ticks_across)
        if ticks_down:
            axes.set_yticks(range(len(ticks_down)), ticks_down)
        if values:
            for y, row in enumerate(rows):
                for x, value in enumerate(row):
                    # Not --ink: the cell's colour is the same on all paper.
                    shade = "#fefefe" if value < 0.6 else "#010101"
                    axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=shade)
        bar = figure.colorbar(image, ax=axes, label=scale, pad=0.02)
        bar.outline.set_visible(False)
        return _svg(name, figure)


def match_errors(name: str, layers: Sequence[Layer]) -> Svg:
    """The error of the stream after each layer, before and after block matching."""
    pairs = [layer.match for layer in layers if layer.match is not None]
    with _drawing(2.5) as (figure, axes):
        axes.set_yscale("log")
        for i, title in enumerate(("before", "after")):
            axes.plot([pair[i] for pair in pairs], color=SERIES[1 - i], marker=MARKERS[i], markersize=3.5,
                      linewidth=1.2, linestyle=("--", "-")[i], label=title)  # fmt: skip
        _plain_log_ticks(axes)
        axes.set_xlabel("layer")
        axes.set_ylabel("error of the stream")
        axes.legend()
        return _svg(name, figure)


def by_position(name: str, models: Mapping[str, Sequence[Mapping[str, Any]]]) -> Svg:
    """Perplexity by position in the block, a line for each model.

    Args:
        models: by name, rows with start, end and value.
    """
    with _drawing(2.5) as (figure, axes):
        for i, (model, rows) in enumerate(models.items()):
            middles = [(row["start"] + row["end"]) / 2 for row in rows]
            axes.plot(middles, [row["value"] for row in rows], color=SERIES[i % len(SERIES)],
                      marker=MARKERS[i % len(MARKERS)], markersize=4, label=model)  # fmt: skip
        axes.set_xlabel("position in the text, tokens")
        axes.set_ylabel("perplexity")
        # Above the picture: names may be long.
        figure.legend(loc="outside upper left", ncols=2 if max(map(len, models)) <= 22 else 1)
        return _svg(name, figure)


def learning_curve(name: str, history: Mapping[str, Any]) -> Svg:
    """KL over the tokens trained on, on the text of every step and on held-out text.

    Args:
        history: as `care heal` writes it: `steps`, `measurements`, `tokens_per_step`.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        drawn = {**history, "losses": history["steps"]}
        return inline(name, healing_figure({"": drawn}, show_losses=True, size=(WIDTH, 2.8)))
