"""`care bench convert`: seconds of every stage of whole conversions."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from care_mla.bench.rows import row
from care_mla.bench_config import BenchConfig
from care_mla.configs import ConvertConfig
from care_mla.device import pick_device, restart_peak
from care_mla.pipeline import convert


def bench_convert(config: BenchConfig, conversion: Callable[[Path], ConvertConfig]) -> list[dict[str, Any]]:
    """Rows of seconds by stage and in all, and of the most bytes in use.

    Args:
        conversion: the options of a conversion into a folder; nothing of another one is used again.

    Raises:
        CareError: the conversion cannot be made.
    """
    stages: dict[str, list[float]] = {}
    peaks: list[float] = []
    for _ in range(config.number):
        restart_peak(pick_device(config.device))
        with tempfile.TemporaryDirectory(dir=config.scratch, prefix="care-bench-") as folder:
            body = convert(conversion(Path(folder)))
        for stage, seconds in body["stages"].items():
            stages.setdefault(stage, []).append(seconds)
        peaks.append(body["peak_memory_bytes"])
    stages["all"] = [sum(each) for each in zip(*stages.values(), strict=True)]
    what = {"model": config.models[0]}
    rows = [row(values, unit="seconds", metric=stage, **what) for stage, values in stages.items()]
    return [*rows, row(peaks, unit="bytes", metric="peak", **what)]
