"""The report in a real browser: nothing overflows, all can be read, light and dark; nothing is fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser.chromium import Tab, open_browser
from care_mla.report.page import write_report
from report_cases import write_large_results, write_results

pytestmark = pytest.mark.browser

# Elements that stick out of the page, but for what scrolls by itself. A telephone zooms out until all is
# seen, so its own width is no measure.
OVERFLOWING = """
JSON.stringify([...document.querySelectorAll('body *')]
  .filter(e => !e.closest('.scroll') || e.matches('.scroll'))
  .filter(e => e.getBoundingClientRect().right > WIDTH + 1 || e.getBoundingClientRect().left < -1)
  .map(e => e.outerHTML.slice(0, 120)))
"""
# Texts of a figure that stick out of it.
CUT = """
JSON.stringify([...document.querySelectorAll('figure svg text')].filter(t => {
  const a = t.getBoundingClientRect(), b = t.closest('svg').getBoundingClientRect();
  return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
}).map(t => t.textContent))
"""
# Texts of a figure that cover each other, but for what lies on a mark: turned texts' boxes are theirs too.
COVERED = """
JSON.stringify([...document.querySelectorAll('figure svg')].flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  return texts.flatMap(([name, a], i) => texts.slice(i + 1).filter(([, b]) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 0.3 * Math.min(a.height, b.height)
  ).map(([other]) => `${svg.closest('figure').getAttribute('aria-label')}: ${name} | ${other}`));
}))
"""
SMALLEST_TEXT = """
Math.min(...[...document.querySelectorAll('body *')].filter(e => [...e.childNodes].some(
  n => n.nodeType == 3 && n.textContent.trim())).map(e => {
    const svg = e.closest('svg');
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    return parseFloat(getComputedStyle(e).fontSize) * scale;
  }))
"""
# WCAG's contrast of the least legible text with the paper; numbers in heat maps lie on their cells.
LEAST_CONTRAST = """
(() => {
  const light = c => [.2126, .7152, .0722].reduce((sum, w, i) => {
    const v = c[i] / 255; return sum + w * (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); }, 0);
  const rgb = s => (s.match(/[\\d.]+/g) || []).map(Number);
  const paper = light(rgb(getComputedStyle(document.documentElement).backgroundColor));
  const texts = [...document.querySelectorAll('h1, h2, h3, p, td, th, dt, dd, figcaption, svg text')]
    .filter(e => !/#(fefefe|010101)/.test(e.getAttribute('style') || ''));
  return Math.min(...texts.map(e => {
    const style = getComputedStyle(e), ink = light(rgb(e.closest('svg') ? style.fill : style.color));
    return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05);
  }));
})()
"""


def overflowing(tab: Tab, width: int) -> list[str]:
    return json.loads(tab.evaluate(OVERFLOWING.replace("WIDTH", str(width))))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    write_results(folder)
    return write_report(folder)


@pytest.fixture(scope="module")
def large_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    write_large_results(folder)
    return write_report(folder)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with open_browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


def assert_legible(tab: Tab, width: int) -> None:
    assert tab.evaluate("innerWidth") == width
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert overflowing(tab, width) == []
    assert json.loads(tab.evaluate(CUT)) == []
    assert json.loads(tab.evaluate(COVERED)) == []
    assert tab.evaluate(SMALLEST_TEXT) >= 8


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_overflows_and_all_can_be_read(
    tab: Tab, report: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    tab.open(report, width=width, dark=dark)
    assert_legible(tab, width)
    # Two models stand side by side on a telephone too.
    first = "document.querySelector('.scroll')"
    assert tab.evaluate(f"{first}.scrollWidth - {first}.clientWidth") <= 0
    assert tab.evaluate(LEAST_CONTRAST) >= 4.5
    assert tab.evaluate("performance.getEntriesByType('resource').length") == 0
    paper = tab.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is not dark
    tab.screenshot(tmp_path / "page.png")
    png = (tmp_path / "page.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") == width


@pytest.mark.parametrize("width", [390, 1440])
def test_large_models_many_methods_and_long_names(tab: Tab, large_report: Path, width: int) -> None:
    tab.open(large_report, width=width, dark=False)
    assert_legible(tab, width)


def test_a_fault_would_be_seen(tab: Tab, tmp_path: Path) -> None:
    (tmp_path / "wide.html").write_text(
        "<meta name='viewport' content='width=device-width'><div style='width:500px'>wide</div>"
        "<figure><svg viewBox='0 0 99 99' width='99'><text x='9' y='50'>one</text><text x='12' y='50'>two"
        "</text><text x='90' y='80'>three</text></svg></figure>"
    )
    tab.open(tmp_path / "wide.html", width=390, dark=False)
    assert len(overflowing(tab, 390)) == 1
    assert json.loads(tab.evaluate(COVERED)) == ["null: one | two"]
    assert json.loads(tab.evaluate(CUT)) == ["three"]


def test_it_prints(tab: Tab, report: Path) -> None:
    tab.open(report, width=1440, dark=True)
    tab.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert tab.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert len(tab.call("Page.printToPDF")["data"]) > 10_000
    tab.call("Emulation.setEmulatedMedia", media="", features=[])
