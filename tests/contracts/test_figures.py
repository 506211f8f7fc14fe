"""A measured figure in README.md or docs is made from JSON; the only other numbers are those listed here."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
# docs/models.md is made from JSON as a whole; test_benchmarks.py checks all that is made.
PAGES = [
    "README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.name != "models.md"),
]
MADE = re.compile(r"<!-- (table|figure): .*?<!-- end -->", re.DOTALL)
# What is typed, or leads elsewhere, states no result.
NOT_PROSE = re.compile(r"```.*?```|`[^`\n]+`|\]\([^)]*\)|https?://\S+|arXiv \S+", re.DOTALL)
# Decimal numbers, percentages, and numbers with a unit in which results come.
NUMBER = re.compile(
    r"(?<![\w.,§])\d[\d,]*(?:\.\d+)+|(?<![\w.,^])\d+e-?\d+|"
    r"(?<![\w.,^])\d[\d,.]* ?(?:%|[KMG]i?B\b|(?:CPU )?(?:s|seconds|minutes|hours|nats)\b|times\b)"
)
# Numbers of the program and of its engines: versions, constants, tolerances, arithmetic.
ALLOWED = {
    "README.md": ["Python 3.11", "Apache-2.0"],
    "docs/engines.md": [
        *("transformers 5.15", "vLLM 0.32 and 0.33", "SGLang 0.5.23"),
        *("made for 1e-6", "tolerance of 1e-4", "gives 0.2 and more", "( 1e-2, 5e-2, 0.15, 0.3, 0.7)"),
    ],
    "docs/healing.md": ["latent of 1e-7", "at most 6 GiB on a GPU, 1.5 GiB on a CPU"],
    "docs/memory.md": ["Python and torch | 1 GiB"],
    "docs/methods.md": ["to the power 0.5", "30 % of C"],
    "docs/rope.md": [
        *(
            "15 to 23 %",
            "between 1e4 and 5e5",
            "diverges more than 1.5 times as much",
            "(0.1 ln(factor) + 1)",
        ),
    ],
}


def prose(text: str) -> str:
    return NOT_PROSE.sub(" ", MADE.sub(" ", text))


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "benchmarks" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["figures"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES)
def test_no_measured_figure_is_typed_by_hand(page: str) -> None:
    text = " ".join(prose((ROOT / page).read_text(encoding="utf-8")).split())
    allowed = ALLOWED.get(page, [])
    for phrase in allowed:
        assert phrase in text, f"{page} no longer says {phrase!r}: take it off the list"
        text = text.replace(phrase, " ")
    found = [text[max(0, m.start() - 30) : m.end() + 20] for m in NUMBER.finditer(text)]
    assert not found, f"{page}: make these from JSON (benchmarks/figures.py), or list them here: {found}"


def test_a_figure_is_what_its_json_says(
    figures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"method": "a", "form": form, "kl": kl} for form, kl in (("x", 0.25), ("y", 0.5))]
    (tmp_path / "r.json").write_text(json.dumps({"original": {"kl": 2.0}, "rows": rows}))
    monkeypatch.setattr(figures, "HERE", tmp_path)
    page = "It is <!-- figure: r.json rows.method=a,form=y.kl/original.kl .0% -->1 %<!-- end --> of it."
    assert figures.with_figures(page) == page.replace("1 %", "25%")
    assert prose(page).split() == ["It", "is", "of", "it."]
    with pytest.raises(LookupError, match="2 rows have method=a"):
        figures.with_figures(page.replace("method=a,form=y", "method=a"))
    with pytest.raises(LookupError):
        figures.with_figures(page.replace("original.kl", "original.perplexity"))


@pytest.mark.parametrize(
    "typed", ["loses 1.5", "twelve or 12 %", "takes 4 minutes", "3e-4 nats", "2,100 MiB", "4 times"]
)
def test_what_counts_as_a_figure(typed: str) -> None:
    assert NUMBER.search(prose(f"{typed} of it"))
    assert not NUMBER.search(prose(f"<!-- figure: a b c -->{typed}<!-- end --> of `{typed}`"))
