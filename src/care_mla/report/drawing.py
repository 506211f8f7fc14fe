"""SVG that lives inside a page: text as text, colours of the page, no ids that could meet others."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# After Okabe and Ito: all kinds of colour vision tell them apart. The page has lighter ones for the dark.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#3a9ad9", "#7f6fbf", "#6b6b6b")
MARKERS = "osD^vPX*"
INK, PAPER = "#010203", "#fdfeff"
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.prop_cycle": None,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.transparent": True,
    "legend.frameon": False,
} | dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
)


class Drawing:
    """A figure with one pair of axes, and its SVG once it is drawn."""

    def __init__(self, figure: Figure, axes: Axes) -> None:
        self.figure, self.axes = figure, axes
        self.svg = ""


@contextmanager
def drawing(name: str, *, title: str, height: float = 3.0) -> Iterator[Drawing]:
    """Draw within; the SVG is there afterwards.

    Args:
        name: what tells its parts from those of other figures on the page.
        title: stands above it, and is what a screen reader says.
        height: in inches, of a width of 5.2.
    """
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = STYLE | {"svg.hashsalt": name, "axes.prop_cycle": cycler(color=COLOURS)}
    with rc_context(style):
        figure = Figure(figsize=(5.2, height), layout="constrained")
        result = Drawing(figure, figure.add_subplot())
        result.axes.set_title(title, loc="left", fontsize="medium")
        yield result
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    result.svg = inline(text.getvalue(), title)


def inline(svg: str, title: str) -> str:
    """An SVG file as an element of a page, in the colours of the page."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r' xmlns(:xlink)?="[^"]*"| version="1\.1"', "", body)
    body = body.replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", body)
    for number, colour in enumerate(COLOURS):
        body = re.sub(colour, f"var(--c{number})", body, flags=re.IGNORECASE)
    body = re.sub(f"{INK}|#000000", "currentColor", body, flags=re.IGNORECASE)
    body = re.sub(PAPER, "var(--paper)", body, flags=re.IGNORECASE)
    # Without a size of its own it takes that of its place.
    body = re.sub(r'^<svg width="[^"]*" height="[^"]*"', f'<svg role="img" aria-label="{title}"', body)
    return body.strip()
