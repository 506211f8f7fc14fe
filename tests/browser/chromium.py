"""Chromium without a window, driven over a pipe by the DevTools protocol: pages as a reader sees them."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TALLEST = 16_000  # pixels of a screenshot that Chromium draws in one piece


def find_browser() -> str:
    """Chromium's command: CARE_CHROMIUM, else the first name that is installed."""
    found = os.environ.get("CARE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    assert found, (
        "These tests look at the report in a real browser, and no Chromium or Chrome was found. Install one, "
        "or name it in CARE_CHROMIUM. Debian: apt-get install chromium  Fedora: dnf install chromium"
    )
    return found


class Tab:
    """One open page."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._unread = b""
        self._number = 0
        self._session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        self.call("Page.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        answer = self._wait("id", self._number)
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    def open(self, path: Path, *, width: int, dark: bool) -> None:
        """Show a file in a window of that width."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._wait("method", "Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"]["value"]

    def screenshot(self, path: Path, *, height: int = TALLEST) -> None:
        """The page from its top as PNG, all of it or so many pixels."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], height), "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _wait(self, key: str, value: object) -> dict[str, Any]:
        """The next message of that kind; events that nobody waits for are passed over."""
        while True:
            while b"\0" not in self._unread:
                part = os.read(self._from, 1 << 20)
                assert part, "the browser has closed"
                self._unread += part
            message, self._unread = self._unread.split(b"\0", 1)
            if (found := json.loads(message)).get(key) == value:
                return found


@contextmanager
def open_browser(profile: Path) -> Iterator[Tab]:
    """A browser with an empty profile; it ends with the block."""
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()

    def connect() -> None:
        # Chromium reads commands from descriptor 3 and answers on 4, which may be taken: copies first.
        reader, writer = os.dup(in_read), os.dup(out_write)
        reader, writer = os.dup2(reader, 30), os.dup2(writer, 31)
        os.dup2(reader, 3)
        os.dup2(writer, 4)

    browser = subprocess.Popen(
        [find_browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         "--remote-debugging-pipe", "--no-first-run", f"--user-data-dir={profile}"],
        preexec_fn=connect, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(in_read)
    os.close(out_write)
    try:
        yield Tab(in_write, out_read)
    finally:
        browser.terminate()
        browser.wait(timeout=20)
        os.close(in_write)
        os.close(out_read)
