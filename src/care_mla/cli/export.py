"""`care export MODEL OUT --profile NAME`: a converted model for another engine, from its folder alone."""

from __future__ import annotations

import time

from care_mla import console
from care_mla.cli.options import parse
from care_mla.cli.result import finish
from care_mla.export_config import ExportConfig


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    start = time.perf_counter()
    config = parse(ExportConfig, "export", arguments)
    from care_mla.export.run import export_model

    body = export_model(config)
    rows = [
        ["profile", body["profile"]],
        ["weights", body["quantization"]],
        ["bytes", f"{body['bytes']:,}"],
        ["check it", body["check"]],
    ]
    console.current().table(f"Exported: {body['output']}", ["", "value"], rows)
    finish(config, "export", start, body)
    return 0
