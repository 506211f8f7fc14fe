"""`care bench decode|memory|convert MODEL…`: speed and memory, several times, side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from care_mla import console
from care_mla.bench_config import BenchConfig
from care_mla.cli.options import parse
from care_mla.cli.result import finish
from care_mla.configs import ConvertConfig


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    start = time.perf_counter()
    config = parse(BenchConfig, "bench", arguments)
    console.silence_transformers()
    rows = _measure(config)
    print_rows(config, rows)
    finish(config, "bench", start, {"what": config.what, "rows": rows, **_machine(config)})
    return 0


def _measure(config: BenchConfig) -> list[dict[str, Any]]:
    match config.what:
        case "decode":
            from care_mla.bench.decode import bench_decode

            return bench_decode(config)
        case "memory":
            from care_mla.bench.memory import bench_memory

            return bench_memory(config)
        case "convert":
            from care_mla.bench.convert import bench_convert

            return bench_convert(config, lambda folder: _conversion(config, folder))


def _conversion(config: BenchConfig, folder: Path) -> ConvertConfig:
    """The conversion that is timed, with outputs and intermediate results in a folder."""
    words = [config.models[0], str(folder / "OUT"), "--work", str(folder / "work")]
    for flag, value in (("--recipe", config.conversion), ("--device", config.device)):
        words += [] if value is None else [flag, str(value)]
    words += ["--quiet"] * config.quiet + ["--trust-remote-code"] * config.trust_remote_code
    return parse(ConvertConfig, "convert", words)


def _machine(config: BenchConfig) -> dict[str, Any]:
    import torch

    from care_mla.device import pick_device

    device = pick_device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "threads": torch.get_num_threads()}


def print_rows(config: BenchConfig, rows: list[dict[str, Any]]) -> None:
    """Print one line per row; the spread lies between the quartiles."""
    columns = ["model", "", "context", "median", "spread", "unit", "ratio"]
    lines = [
        [
            Path(row["model"]).name or row["model"],
            row["metric"],
            row.get("context", ""),
            _number(row["median"]),
            _number(row["spread"]),
            row["unit"],
            f"{row['ratio']:.2f}" if "ratio" in row else "",
        ]
        for row in rows
    ]
    console.current().table(f"Measured {config.number} times", columns, lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
