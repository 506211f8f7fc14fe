"""The JSON file that every command writes with --json."""

from __future__ import annotations

import time
from typing import Any

from care_mla import console
from care_mla.configs import CommonConfig
from care_mla.versions import versions
from care_mla.workspace import write_json


def finish(config: CommonConfig, command: str, start: float, body: dict[str, Any]) -> None:
    """Write the result to the file of --json, if there is one, and say so.

    Args:
        start: `time.perf_counter()` when the command began.
        body: the command's own keys.
    """
    if config.json is None:
        return
    head = {
        "format": f"care-mla/{command}/1",
        "versions": versions(),
        "seconds": round(time.perf_counter() - start, 3),
        "warnings": list(console.current().warnings),
    }
    write_json(config.json, head | body)
    console.current().note(f"Written: {config.json}")
