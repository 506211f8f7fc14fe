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
    finish(config, "bench", start, {"what": config.what, "rows": rows, **_setting(config)})
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


def _setting(config: BenchConfig) -> dict[str, Any]:
    """What the figures depend on besides the models."""
    import torch

    from care_mla.bench.decode import dtype_of
    from care_mla.device import pick_device

    device = pick_device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    setting = {"device": name, "threads": torch.get_num_threads()}
    if config.what != "convert":
        setting["dtype"] = dtype_of(config, device)
    if config.what == "decode":
        setting["new_tokens"] = config.new_tokens
    if config.conversion is not None:
        setting["conversion"] = config.conversion.read_text(encoding="utf-8")
    return setting


def print_rows(config: BenchConfig, rows: list[dict[str, Any]]) -> None:
    """Print one line per row; the spread lies between the quartiles."""
    columns = ["model", "", "context", "median", "spread", "unit", "ratio"]
    names = {model: Path(model).name or model for model in config.models}
    if len(set(names.values())) < len(names):
        names = {model: model for model in config.models}
    lines = [
        [
            names[row["model"]],
            row["metric"],
            row.get("context", ""),
            _number(row["median"]),
            _number(row["spread"]) if len(row["values"]) > 1 else "-",
            row["unit"],
            f"{row['ratio']:.2f}" if "ratio" in row else "",
        ]
        for row in rows
    ]
    times = "once" if config.number == 1 else f"{config.number} times"
    console.current().table(f"Measured {times}", columns, lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
