"""Block matching: lower errors in every form, the same bytes after a kill, one layer in memory."""
# Shapes: B sequences, L positions, D hidden_size.

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from care_mla.calibrate.layers import LayerStack
from care_mla.calibrate.stream import collect_rotation, collect_statistics
from care_mla.decompose.layer_inputs import CalibratedLayers
from care_mla.decompose.methods import Variant
from care_mla.factors import LatentLayer
from care_mla.mla import match
from care_mla.mla.choose import spread
from care_mla.mla.divergence import measure, stand_in
from care_mla.mla.match import (
    Matching,
    Moving,
    Weights,
    batch_order,
    match_layer,
    match_layers,
    run_all,
    stream_error,
    without,
)
from care_mla.workspace import Workspace
from latent_models import exact_layer, load
from unit.test_stream import PeakMemory, files, open_stack, tokens

from pico import pico_model, pico_text, pico_tokenizer

STEPS = Matching(steps=30, seed=0, learning_rate=0.005)
APART = replace(STEPS, heads_apart=True)
# Source, form, method, total latent width, width of a RoPE key.
CASES: dict[str, tuple[dict[str, Any], str, str, int, int]] = {
    "decoupled": ({}, "decoupled", "fisher", 24, 8),
    "decoupled-biases": ({"attention_bias": True}, "decoupled", "fisher", 24, 8),
    "decoupled-qwen3": ({"family": "qwen3"}, "decoupled", "fisher", 24, 8),
    "exact-rope": ({"family": "qwen2"}, "exact-rope", "fisher", 24, 0),
    "exact-rope-separate": ({}, "exact-rope", "svd-llm", 24, 0),
    "exact-rope-post-norm": ({"family": "olmo2"}, "exact-rope", "fisher", 24, 0),
    "exact-rope-experts-window": (
        {"family": "mixtral", "sliding_window": 20, "tied": False}, "exact-rope", "fisher", 24, 0,
    ),
    "decoupled-experts": ({"family": "qwen3_moe"}, "decoupled", "fisher", 24, 8),
    "partial-rope": ({}, "partial-rope", "mha2mla-joint", 20, 8),
}  # fmt: skip


def text(sequences: int, length: int, seed: int = 0) -> Tensor:
    """Token ids of text, (B, L)."""
    ids = pico_tokenizer()(pico_text(sequences * length, seed))["input_ids"]
    return torch.tensor(ids[: sequences * length]).view(-1, length)


def layers_of(
    stack: LayerStack, folder: Path, form: str, method: str, rank: int, width: int
) -> Callable[[int], LatentLayer]:
    """Factored layers of a model, calibrated on a few random tokens."""
    workspace = Workspace(folder)
    collect_rotation(stack, text(2, 128, seed=1), workspace, lambda: None)
    collect_statistics(stack, text(32, 32), workspace, seed=3, chunk_blocks=100, advance=lambda: None)
    inputs = CalibratedLayers(
        stack.source, workspace, stack.inv_freq_F, damping=0.01, device=torch.device("cpu")
    )
    variant = Variant(method=method, form=form, kv_lora_rank=rank, qk_rope_head_dim=width, freqfold=None)
    layer = spread(variant, "uniform", stack.num_layers).layer(inputs)
    return lambda layer_idx: layer(layer_idx).to("cpu", torch.float32)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(match, "MATCHING_BATCH_TOKENS", 128)
    # Rounding must not hide what a test is about; the end-to-end tests run as the machine does.
    monkeypatch.setattr(match, "has_fast_bfloat16", lambda device: False)


@pytest.mark.parametrize("name", CASES)
def test_matching_lowers_errors_and_divergence(name: str, tmp_path: Path) -> None:
    options, *conversion = CASES[name]
    stack = open_stack(pico_model(tmp_path / "model", **options))
    layers = layers_of(stack, tmp_path / "work", *conversion)
    matched, rows = match_layers(
        stack, layers, text(128, 32, seed=5), Workspace(tmp_path / "work"), STEPS, depends_on=name
    )
    assert all(row["error_after"] < row["error_before"] for row in rows), rows
    both = {"before": layers, "after": matched}
    _, measured = measure(stack, both, text(8, 64, seed=7))
    assert measured["after"].mean_kl < 0.97 * measured["before"].mean_kl
    first = matched(0)
    assert first.form == layers(0).form
    assert first.cached_values == layers(0).cached_values
    assert first.tensors().keys() == layers(0).tensors().keys() | {"o_weight_DO"}
    assert not (tmp_path / "work" / "streams").exists()


@pytest.mark.parametrize("options", [{}, {"attention_bias": True}, {"kv_heads": 1}], ids=str)
def test_query_heads_that_part_cache_the_same_and_do_better(options: dict[str, Any], tmp_path: Path) -> None:
    stack = open_stack(pico_model(tmp_path / "model", **options))
    layers = layers_of(stack, tmp_path / "work", "decoupled", "fisher", 24, 8)
    matched, errors = {}, {}
    for steps in (STEPS, APART):
        matched[steps.heads_apart], rows = match_layers(
            stack, layers, text(128, 32, seed=5), Workspace(tmp_path / "work"), steps, depends_on=0
        )
        errors[steps.heads_apart] = rows
    for together, apart in zip(errors[False], errors[True], strict=True):
        assert apart["error_after"] < together["error_after"] < together["error_before"]
    # They begin as the same attention.
    assert errors[True][0]["error_before"] == pytest.approx(errors[False][0]["error_before"], rel=1e-5)
    first = matched[True](0)
    assert first.cached_values == layers(0).cached_values
    assert len(first.up_k_GMR) == len(first.up_v_GHR) == len(first.q_rope_NPD)
    # Heads of one KV head have become different, or nothing would have been gained.
    assert not torch.allclose(first.up_v_GHR[0], first.up_v_GHR[1])
    _, measured = measure(stack, {"together": matched[False], "apart": matched[True]}, text(8, 64, seed=7))
    assert measured["apart"].mean_kl < measured["together"].mean_kl


def test_layers_that_are_exact_stay_as_they_are(tmp_path: Path) -> None:
    folder = pico_model(tmp_path / "model", attention_bias=True)
    model, stack = load(folder), open_stack(folder)
    matched, rows = match_layers(
        stack,
        lambda layer_idx: exact_layer(model, layer_idx),
        tokens(16, 32),
        Workspace(tmp_path / "work"),
        STEPS,
        depends_on=0,
    )
    for layer_idx, row in enumerate(rows):
        assert row["error_before"] < 1e-10
        for key, tensor in exact_layer(model, layer_idx).tensors().items():
            assert torch.equal(matched(layer_idx).tensors()[key], tensor), key


def test_training_does_not_depend_on_the_scale_of_the_latent(tmp_path: Path) -> None:
    stack = open_stack(pico_model(tmp_path / "model"))
    layers = layers_of(stack, tmp_path / "work", "decoupled", "fisher", 24, 8)
    scale_R = torch.logspace(-4, 0, 24)
    scaled = replace(
        layers(0),
        down_RD=layers(0).down_RD * scale_R[:, None],
        up_k_GMR=layers(0).up_k_GMR / scale_R,
        up_v_GHR=layers(0).up_v_GHR / scale_R,
    )
    errors = []
    x_BLD = stack.embed(tokens(16, 32))
    with stack.layer(0) as decoder:
        with without(decoder, "mlp"):
            target_BLD = run_all(stack, decoder, x_BLD)
        for layer in (layers(0), scaled):
            _, row = match_layer(stack, decoder, 0, layer, x_BLD, target_BLD, STEPS)
            errors.append(row["error_after"])
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


def test_a_token_of_enormous_size_counts_as_one_token() -> None:
    target_BLD = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    target_BLD[0, 0] *= 1e4
    found_BLD = target_BLD * 1.1
    assert_close(stream_error(found_BLD, target_BLD), torch.tensor(0.01).log1p())
    # Enormous where the original is not: no more than a few times one of ordinary size.
    found_BLD[0, 1] *= 1e4
    assert stream_error(found_BLD, target_BLD) < 3


def test_every_weight_trains(tmp_path: Path) -> None:
    stack = open_stack(pico_model(tmp_path / "model", "qwen3", attention_bias=True))
    layers = layers_of(stack, tmp_path / "work", "exact-rope", "fisher", 24, 0)
    with stack.layer(0) as decoder:
        latent = replace(layers(0), o_weight_DO=decoder.self_attn.o_proj.weight.detach())
        weights = Weights(latent)
        decoder.self_attn = Moving(stand_in(stack, 0, latent, decoder.self_attn), weights)
        stack.run(decoder, stack.embed(tokens(2, 16))).square().sum().backward()
    assert weights.moves.keys() == latent.tensors().keys() - {"inv_freq_JF"}
    for name, move in weights.moves.items():
        assert move.grad is not None, name
        assert move.grad.abs().max() > 0, name


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from care_mla.mla import match
from care_mla.workspace import Workspace
from unit.test_match import APART, layers_of
from unit.test_stream import open_stack, tokens

left = int(sys.argv[3])
def killing(save):
    def save_and_count(path, value):
        global left
        save(path, value)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return save_and_count

match.save_tensors, match.write_json = killing(match.save_tensors), killing(match.write_json)
match.MATCHING_BATCH_TOKENS = 128
match.has_fast_bfloat16 = lambda device: False
stack = open_stack(Path(sys.argv[1]))
work = Path(sys.argv[2])
layers = layers_of(stack, work, "decoupled", "fisher", 24, 8)
match.match_layers(stack, layers, tokens(16, 32, seed=5), Workspace(work), APART, depends_on=0)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("saved", [1, 4])
def test_a_killed_process_goes_on_to_the_same_files(saved: int, tmp_path: Path) -> None:
    """Killed when a layer is matched, and when the third one's input is there."""
    folder = pico_model(tmp_path / "model", layers=3)
    stack = open_stack(folder)
    results = []
    for name in ("killed", "whole"):
        work = tmp_path / name
        if name == "killed":
            command = [sys.executable, "-c", KILLED, str(folder), str(work), str(saved)]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
            done = subprocess.run(command, check=False, timeout=120, env=environment)
            assert done.returncode == -signal.SIGKILL
            assert list(work.glob("match_*/layer_*.json"))
        layers = layers_of(stack, work, "decoupled", "fisher", 24, 8)
        match_layers(stack, layers, tokens(16, 32, seed=5), Workspace(work), APART, depends_on=0)
        results.append(files(work))
    assert results[0] == results[1]
    assert sorted(Path(path).name for path in results[0] if path.startswith("match_")) == [
        name for i in range(3) for name in (f"layer_{i:03}.safetensors", f"layer_{i:03}.safetensors.json")
    ]


def test_no_sequence_comes_twice_before_all_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(match, "MATCHING_BATCH_TOKENS", 512)
    order = list(batch_order(10, 256, replace(STEPS, steps=6), 0))
    assert [len(rows) for rows in order] == [2] * 6
    assert sorted(torch.cat(order[:5]).tolist()) == list(range(10))
    again, other = (
        torch.cat(list(batch_order(10, 256, replace(STEPS, steps=6), layer_idx))) for layer_idx in (0, 1)
    )
    assert torch.equal(torch.cat(order), again)
    assert not torch.equal(again, other)


def test_other_options_are_other_files(tmp_path: Path) -> None:
    stack = open_stack(pico_model(tmp_path / "model"))
    layers = layers_of(stack, tmp_path / "work", "decoupled", "fisher", 24, 8)
    for matching in (STEPS, replace(STEPS, steps=3), replace(STEPS, seed=1), APART):
        match_layers(stack, layers, tokens(8, 32), Workspace(tmp_path / "work"), matching, depends_on=0)
    assert len(list((tmp_path / "work").glob("match_*"))) == 4


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    peaks = {}
    for depth in (3, 9):
        # bfloat16 weights, so that every layer's float32 copy is a tensor of its own.
        folder = pico_model(tmp_path / f"model-{depth}", layers=depth, dtype=torch.bfloat16)
        stack, work = open_stack(folder), tmp_path / f"work-{depth}"
        layers = layers_of(stack, work, "decoupled", "fisher", 24, 8)
        with PeakMemory() as memory:
            match_layers(
                stack,
                layers,
                tokens(8, 32),
                Workspace(work),
                replace(STEPS, steps=2),
                depends_on=0,
                # Factoring leaves cycles, which Python collects when it likes.
                advance=lambda row: gc.collect(),
            )
        peaks[depth] = memory.peak
    layer_bytes = 4 * 3 * 64 * 128
    assert peaks[3] > layer_bytes
    assert peaks[9] < peaks[3] + layer_bytes / 10, peaks
