"""`care plan MODEL`: prints what a conversion will need and give. Reads the model's configuration alone."""

from __future__ import annotations

import time

from care_mla import console
from care_mla.cli.options import parse
from care_mla.cli.result import finish
from care_mla.configs import PlanConfig
from care_mla.plan import GIB, Plan, machine_memory, plan
from care_mla.serving import fit_vllm, kernel_summary


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    start = time.perf_counter()
    config = parse(PlanConfig, "plan", arguments)
    from care_mla.checkpoint.opening import open_source

    facts = open_source(config.model, trust_remote_code=config.trust_remote_code, weights=False).facts
    config, size_warnings = fit_vllm(facts, config)
    device, memory_bytes = _device(config.device)
    result = plan(
        facts, config, device=device, memory_bytes=memory_bytes, flops_per_second=_measured_rate(device)
    )
    for warning in (*result.warnings, *size_warnings):
        console.current().warn(warning)
    for reason in result.needs_healing:
        console.current().warn(f"needs healing: --form {config.form} is approximate, since {reason}")
    kernels = [kernel_summary(facts, dims) for dims in result.candidates if config.form == "decoupled"]
    _print(config.model, result, device, memory_bytes, kernels)
    body = {"model": config.model, "device": device, "vllm_kernels": kernels}
    finish(config, "plan", start, body | result.as_json())
    return 0


def _device(asked: str | None) -> tuple[str, int]:
    """(device, its memory in bytes): free memory of a GPU, all of the machine's memory for the CPU."""
    import torch

    from care_mla.errors import OptionError

    device = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise OptionError(f"--device {device}: torch finds no GPU here. Try --device cpu")
        return device, torch.cuda.mem_get_info(device)[0]
    return device, machine_memory()


def _measured_rate(device: str) -> float:
    """Floating-point operations per second of float32 matrix products, the best of three."""
    import torch

    size = 1024 if device == "cpu" else 8192
    a = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        product = a @ a
        product[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _print(model: str, result: Plan, device: str, memory_bytes: int, kernels: list[str]) -> None:
    terminal = console.current()
    values, cache = result.cached_values, result.cache_bytes_per_token
    share = values["converted"] / values["original"]
    widths = " or ".join(f"{c.kv_lora_rank} + {c.qk_rope_head_dim}" for c in result.candidates)
    fits = "fits" if result.memory_bytes <= memory_bytes else "DOES NOT FIT"
    terminal.table(
        f"Plan for {model}: --method {result.method}, --form {result.form}",
        ["", "original", "converted"],
        [
            [
                "cached values per token and layer",
                values["original"],
                f"{values['converted']:,} ({share:.1%})",
            ],
            ["cache, bytes per token (16 bit)", cache["original"], cache["converted"]],
            ["parameters", result.parameters["original"], result.parameters["converted"]],
            ["latent + RoPE key", "-", widths],
            *([["decode kernels in vLLM", "-", " or ".join(dict.fromkeys(kernels))]] if kernels else []),
        ],
    )
    sequences = -(-result.calibration_tokens // result.sequence_length)
    rows = [
        ["calibration tokens", f"{result.calibration_tokens:,} ({sequences} x {result.sequence_length})"],
        ["length for RoPE statistics", f"{result.rotation_length:,} tokens"],
        ["passes over the weights (chunks)", str(result.chunks)],
        [f"memory ({device}, of {memory_bytes / GIB:.1f} GiB)", f"{_gib(result.memory_bytes)}, {fits}"],
        *[[f"  {part}", _gib(nbytes)] for part, nbytes in result.memory.items()],
        ["disk", _gib(result.disk_bytes)],
        *[[f"  {part}", _gib(nbytes)] for part, nbytes in result.disk.items()],
        ["time floor", _duration(result.seconds)],
        ["  operations", f"{result.flops:.2e}"],
        ["  measured rate, per second", f"{result.flops_per_second:.2e}"],
    ]
    terminal.table("What it needs", ["", "amount"], rows)


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
