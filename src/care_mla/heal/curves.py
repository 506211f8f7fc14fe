"""Learning curves: the loss of every step, and KL to the original on held-out text, as SVG.

Writes `healing.json`, what was drawn, and `healing.svg`. A function of its arguments alone: the same training
gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from care_mla.workspace import write_json, write_text

DATA, FIGURE = "healing.json", "healing.svg"
# Okabe and Ito's colours, which all kinds of colour vision tell apart, with a line style for each.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
# Text stays text, which can be searched, and ids do not differ from run to run.
SVG = {"svg.fonttype": "none", "svg.hashsalt": "care", "font.size": 9}


def write_curves(history: Mapping[str, Any], folder: Path) -> None:
    """Write a training's curves and their data into a folder.

    Args:
        history: `losses` with step, loss and kl of every step; `measurements` with step and kl; `best_step`;
            `tokens_per_step`.
    """
    write_json(folder / DATA, history)
    write_text(folder / FIGURE, healing_figure({"": history}, show_losses=True))


def healing_figure(
    histories: Mapping[str, Mapping[str, Any]],
    *,
    show_losses: bool = False,
    size: tuple[float, float] = (6.4, 3.6),
) -> str:
    """Held-out KL over the tokens trained on, a curve for each name, as SVG text.

    Args:
        histories: by the name in the legend, of trainings as `write_curves` takes them.
        show_losses: also KL on the text of every step, thin.
        size: width and height in inches.
    """
    import io

    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    with rc_context(SVG):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for number, (name, history) in enumerate(histories.items()):
            per_step = history["tokens_per_step"]
            colour = COLOURS[number % len(COLOURS)]
            if show_losses:
                steps = [(row["step"] * per_step, row["kl"]) for row in history["losses"]]
                axes.plot(*zip(*steps, strict=True), color=colour, alpha=0.4, linewidth=0.7)
            points = [(row["step"] * per_step, row["kl"]) for row in history["measurements"]]
            style = STYLES[number % len(STYLES)]
            label = name or "held-out text"
            axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, marker=".", label=label)
        axes.set_xlabel("tokens trained on")
        axes.set_ylabel("KL to the original, nats per token")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        # Plain numbers: powers of ten are several pieces of text, which fall apart in another font.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.grid(visible=True, linewidth=0.3)
        if show_losses:
            axes.plot([], [], color=COLOURS[0], alpha=0.4, linewidth=0.7, label="text trained on")
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
