"""The device that work runs on, and what it took there."""

from __future__ import annotations

import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from care_mla.errors import OptionError


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or a GPU if there is one.

    Raises:
        OptionError: this machine has no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= count.get(device.type, 0):
        raise OptionError(
            f"--device {name}: this machine has {count.get(device.type, 0)} such devices that torch can use. "
            "Try --device cpu"
        )
    return device


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found no room for a tensor; on a CPU it has no class of its own for that."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def restart_peak(device: torch.device) -> None:
    """Let `peak_memory` count from now on; on a CPU where Linux allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """Most bytes in use at any time of this process: of the GPU on a GPU, else resident in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux hands getrusage's peak on from the process that started this one; its own is here.
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are a matter of hardware there, and so several times as fast."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Older versions of torch do not tell.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))
