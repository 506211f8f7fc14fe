"""`care report FOLDER`: FOLDER/report.html, one page about every result in the folder."""

from __future__ import annotations

import time

from care_mla import console
from care_mla.cli.options import parse
from care_mla.cli.result import finish
from care_mla.report_config import ReportConfig


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    start = time.perf_counter()
    config = parse(ReportConfig, "report", arguments)
    from care_mla.report.page import write_report

    path = write_report(config.folder)
    console.current().out(f"Report: {path}")
    finish(config, "report", start, {"report": str(path)})
    return 0
