"""The parts of `care bench` that need no model."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from care_mla.bench.rows import add_ratios, row
from care_mla.bench_config import BenchConfig
from care_mla.device import peak_memory, restart_peak
from care_mla.errors import OptionError


@pytest.mark.parametrize("context", [",", "16,,64", "²", "0", "-1", "1.5"])
def test_contexts_are_whole_numbers(context: str) -> None:
    with pytest.raises(OptionError, match="--context"):
        BenchConfig(what="decode", models=("demo",), context=context)


def test_a_model_named_twice_is_compared_with_its_first_rows() -> None:
    rows = [row([value], unit="s", metric="decode", model="demo", context=16) for value in (2.0, 3.0)]
    add_ratios(rows, "demo")
    assert [each["ratio"] for each in rows] == [1.0, 1.5]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hand it on")
def test_peak_memory_is_not_that_of_the_process_before() -> None:
    held = b"x" * 2**30
    code = "import torch; from care_mla.device import peak_memory; print(peak_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < len(held)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_a_peak_is_counted_from_where_it_is_restarted() -> None:
    cpu = torch.device("cpu")
    held = torch.ones(2**26)
    del held
    before = peak_memory(cpu)
    restart_peak(cpu)
    assert peak_memory(cpu) < before - 2**27
