"""Streamed statistics against their definitions on whole models; chunks, memory, and a killed process."""
# Shapes: B sequences, L positions, D hidden_size, N query heads, G KV heads, H head_dim.

from __future__ import annotations

import os
import signal
import subprocess
import sys
import weakref
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from care_mla.calibrate import attention, stream
from care_mla.calibrate.layers import LayerStack
from care_mla.calibrate.statistics import LayerSums, RotationSums, sums_class
from care_mla.calibrate.stream import collect_rotation, collect_statistics, layer_file
from care_mla.checkpoint.opening import open_source
from care_mla.errors import ResumeError
from care_mla.workspace import Workspace
from slow_statistics import SlowModel

from pico import pico_model

CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mqa": {"kv_heads": 1, "layers": 3},
    "mha": {"kv_heads": 4},
    "biases-untied-llama3": {"attention_bias": True, "mlp_bias": True, "tied": False, "rope": "llama3"},
    "qwen2": {"family": "qwen2"},
    "yarn": {"rope": "yarn"},
    "window": {"family": "mistral", "sliding_window": 7},
    "qwen3": {"family": "qwen3"},
    "qwen3-biases": {"family": "qwen3", "attention_bias": True, "kv_heads": 1},
    "olmo2": {"family": "olmo2"},
}


def tokens(sequences: int, length: int, seed: int = 0, vocab: int = 320) -> Tensor:
    return torch.randint(vocab, (sequences, length), generator=torch.Generator().manual_seed(seed))


def open_stack(folder: Path) -> LayerStack:
    return LayerStack(open_source(str(folder)), device=CPU)


def sweep(stack: LayerStack, folder: Path, *, chunk_blocks: int = 1000) -> None:
    workspace = Workspace(folder)
    collect_rotation(stack, tokens(2, 30, seed=1), workspace, lambda: None)
    collect_statistics(
        stack, tokens(5, 12), workspace, seed=3, chunk_blocks=chunk_blocks, advance=lambda: None
    )


def load_sums(folder: Path, kind: type[LayerSums] = LayerSums) -> list[LayerSums]:
    return [kind.load(path) for path in sorted((folder / "statistics").iterdir())]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", MODELS)
def test_streamed_statistics_are_their_definition(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks of rows and micro-batches smaller than the sequences and chunks, none of which divides another.
    monkeypatch.setattr(attention, "ROWS", 9)
    monkeypatch.setattr(stream, "MICRO_BATCH_TOKENS", 24)
    monkeypatch.setattr(stream, "HEAD_ROWS", 17)
    folder = pico_model(tmp_path / "model", **MODELS[name])
    stack = open_stack(folder)
    sweep(stack, tmp_path / "work")
    kind = sums_class(stack.source.facts)
    sums = load_sums(tmp_path / "work", kind)
    slow = SlowModel(folder)
    gammas = slow.gammas(tokens(2, 30, seed=1))
    expected = slow.statistics(tokens(5, 12), gammas, seed=3)
    for i, gamma_NF in enumerate(gammas):
        rotation = RotationSums.load(tmp_path / "work" / "rotation" / layer_file(i))
        assert_close(rotation.gamma_NF, gamma_NF, rtol=1e-4, atol=1e-5)
        assert (rotation.length, rotation.tokens) == (30, 60)
        assert {f.name for f in fields(kind)} == expected[i].keys()
        for name, value in expected[i].items():
            assert_close(
                getattr(sums[i], name), value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=name
            )


@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("length", [3, 128, 150])
def test_observed_attention_is_stock_attention(length: int, window: int | None) -> None:
    query_BNLH, key_BGLH, value_BGLH = torch.randn(2, 6, length, 8), *torch.randn(2, 2, 3, length, 8)
    behind_LL = torch.arange(length)[:, None] - torch.arange(length)
    seen_LL = (behind_LL >= 0) & (behind_LL < (window or length))
    inputs = [x.requires_grad_() for x in (query_BNLH, key_BGLH, value_BGLH)]
    expected = nn.functional.scaled_dot_product_attention(
        *inputs, attn_mask=seen_LL, scale=0.3, enable_gqa=True
    )
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, inputs, grad)
    turn = attention.Turn.of(torch.rand(4), length, 1.0)
    sums = RotationSums.zeros(hidden_size=4, num_heads=6, head_dim=8, length=length, device=CPU)
    with torch.no_grad():
        assert_close(attention.RotationObserver(sums, turn).attend(*inputs, 0.3, window), expected)
    observer = attention.FisherObserver(torch.rand(6, 4).to(torch.complex128), turn)
    output = observer.attend(*inputs, 0.3, window)
    assert_close(output, expected)
    assert_close(torch.autograd.grad(output, inputs, grad), expected_grads, rtol=1e-4, atol=1e-5)


def test_layers_one_by_one_are_the_stock_model(tmp_path: Path) -> None:
    folder = pico_model(tmp_path / "model", "mistral", sliding_window=7, tied=False)
    stack = open_stack(folder)
    x_BLD = stack.embed(tokens(2, 20))
    for layer_idx in range(stack.num_layers):
        with torch.no_grad(), stack.layer(layer_idx) as layer:
            x_BLD = stack.run(layer, x_BLD)
    with torch.no_grad(), stack.head() as head:
        logits_BLS = head(x_BLD)
    assert_close(logits_BLS.double(), SlowModel(folder).model(tokens(2, 20)).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sums_do_not_depend_on_chunks(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MICRO_BATCH_TOKENS", 24)
    stack = open_stack(pico_model(tmp_path / "model", family))
    kind = sums_class(stack.source.facts)
    sweep(stack, tmp_path / "whole")
    for chunk_blocks in (1, 2, 3, 4):
        sweep(stack, tmp_path / f"chunks-{chunk_blocks}", chunk_blocks=chunk_blocks)
        parts = load_sums(tmp_path / f"chunks-{chunk_blocks}", kind)
        for a, b in zip(load_sums(tmp_path / "whole", kind), parts, strict=True):
            assert all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(kind))


def test_spooled_layer_inputs_are_removed(tmp_path: Path) -> None:
    sweep(open_stack(pico_model(tmp_path / "model")), tmp_path / "work", chunk_blocks=2)
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"rotation", "statistics"}


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from care_mla.calibrate import stream
from care_mla.calibrate.layers import LayerStack
from care_mla.checkpoint.opening import open_source
from care_mla.errors import ResumeError
from care_mla.workspace import Workspace

left = int(sys.argv[3])

def advance():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

stream.MICRO_BATCH_TOKENS = 24
stack = LayerStack(open_source(sys.argv[1]), device=torch.device("cpu"))
workspace = Workspace(Path(sys.argv[2]))
generator = torch.Generator().manual_seed(1)
stream.collect_rotation(stack, torch.randint(320, (2, 30), generator=generator), workspace, advance)
generator = torch.Generator().manual_seed(0)
stream.collect_statistics(
    stack, torch.randint(320, (5, 12), generator=generator), workspace, seed=3, chunk_blocks=2,
    advance=advance
)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_process_goes_on_to_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MICRO_BATCH_TOKENS", 24)
    folder = pico_model(tmp_path / "model")
    stack = open_stack(folder)
    sweep(stack, tmp_path / "whole", chunk_blocks=2)
    # The 8th layer: on the way down through the second chunk's layers.
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "killed"), "8"]
    assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / "spool").is_dir()
    sweep(stack, tmp_path / "killed", chunk_blocks=2)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors made inside, views and frees respected."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key, None)
            self.peak = max(self.peak, sum(self.alive.values()))


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    peaks = {}
    for depth in (4, 24):
        # bfloat16 weights, so that every layer's float32 copy is a tensor of its own.
        folder = pico_model(tmp_path / f"model-{depth}", layers=depth, dtype=torch.bfloat16)
        stack = open_stack(folder)
        with PeakMemory() as memory:
            sweep(stack, tmp_path / f"work-{depth}", chunk_blocks=2)
        peaks[depth] = memory.peak
    layer_bytes = 4 * 3 * 64 * 128
    assert peaks[4] > layer_bytes
    assert peaks[24] < peaks[4] + layer_bytes / 10, peaks


def test_the_tied_head_is_in_memory_once(tmp_path: Path) -> None:
    stack = open_stack(pico_model(tmp_path / "model", vocab=2000, dtype=torch.bfloat16))
    table_bytes = 4 * 2002 * 64
    with PeakMemory() as memory, stack.head() as head:
        assert sum(memory.alive.values()) < 1.1 * table_bytes
        assert memory.peak > table_bytes
        del head
    assert sum(memory.alive.values()) < 0.1 * table_bytes


def test_another_chunk_size_never_counts_a_sequence_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "MICRO_BATCH_TOKENS", 24)
    stack = open_stack(pico_model(tmp_path / "model"))
    sweep(stack, tmp_path / "work")
    finished = files(tmp_path / "work")
    sweep(stack, tmp_path / "work", chunk_blocks=2)
    assert files(tmp_path / "work") == finished
    for path in (tmp_path / "work" / "statistics").iterdir():
        path.unlink()
    stop_after = iter(range(5))
    with pytest.raises(StopIteration):
        collect_statistics(
            stack,
            tokens(5, 12),
            Workspace(tmp_path / "work"),
            seed=3,
            chunk_blocks=2,
            advance=lambda: next(stop_after),
        )
    with pytest.raises(ResumeError, match=r"sequences per chunk \(--max-spool-gib\) was 2, now 4"):
        sweep(stack, tmp_path / "work", chunk_blocks=4)
    sweep(stack, tmp_path / "work", chunk_blocks=2)
    for a, b in zip(load_sums(tmp_path / "work"), load_sums(tmp_path / "work"), strict=True):
        assert a.tokens == b.tokens == 60
