"""The report in a real browser: nothing sticks out of the page at a phone's and a desktop's width.

Runs under `make test-browser`, which needs Chromium or Chrome (or its path in CARE_CHROMIUM).
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from care_mla.report.page import write_report
from unit.test_report import bodies, write

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# What scrolls by itself may be wider inside.
MEASURE = """<script>
addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter(
    (e) => !e.closest(".scroll, pre, svg") && e.getBoundingClientRect().right > innerWidth + 1);
  const dark = getComputedStyle(document.body).backgroundColor;
  parent.document.body.setAttribute("data-measured", JSON.stringify({
    inner: innerWidth, page: document.documentElement.scrollWidth, background: dark,
    wide: wide.map((e) => e.tagName + " " + e.textContent.slice(0, 40)) }));
});
</script>"""
# A window is 500 wide at least; a frame has any width, and is what the page's media queries see.
FRAME = """<!doctype html><style>:root { color-scheme: light dark }</style>
<iframe style="border: 0; width: WIDTHpx; height: 2000px" srcdoc="PAGE"></iframe>"""


def browser() -> str:
    found = os.environ.get("CARE_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, (
        "no Chromium or Chrome here. Debian, Ubuntu: sudo apt-get install chromium; or CARE_CHROMIUM=PATH"
    )
    return found


def run(*options: str) -> str:
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_overflows(width: int, scheme: str, tmp_path: Path) -> None:
    for path in [*BENCHMARKS.glob("one-shot/compare-*-seed0.json"), BENCHMARKS / "convert" / "first.json"]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    page = write_report(write(tmp_path, bodies()))
    measured = tmp_path / "measured.html"
    whole = html.escape(page.read_text().replace("</body>", f"{MEASURE}</body>"))
    measured.write_text(FRAME.replace("WIDTH", str(width)).replace("PAGE", whole))
    # A browser without a screen asks its desktop for the scheme; this is how it is told.
    options = ["--blink-settings=preferredColorScheme=" + ("0" if scheme == "dark" else "1")]
    dom = run(
        *options,
        f"--window-size={width + 60},2000",
        "--virtual-time-budget=3000",
        "--dump-dom",
        measured.as_uri(),
    )
    match = re.search(r'data-measured="([^"]*)"', dom)
    assert match is not None
    found = json.loads(match[1].replace("&quot;", '"'))
    assert found["inner"] == width
    assert found["wide"] == []
    assert found["page"] <= width
    is_dark = sum(int(part) for part in re.findall(r"\d+", found["background"])[:3]) < 200
    assert is_dark == (scheme == "dark")
    picture = tmp_path / "page.png"
    run(*options, f"--window-size={width},2000", f"--screenshot={picture}", page.as_uri())
    assert picture.stat().st_size > 20_000
