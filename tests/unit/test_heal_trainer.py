"""The training loop: what its result depends on, when it ends, and how it goes on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from care_mla.errors import CareError
from care_mla.heal.checkpoints import Checkpoints, RunState
from care_mla.heal.trainer import is_over, make_optimizer, set_learning_rate
from care_mla.heal_config import HealConfig
from care_mla.workspace import Workspace
from export_cases import export
from heal_cases import curve, options, run, sizes_of


class Models(NamedTuple):
    """A converted folder and its original."""

    folder: Path
    original: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("trainer")
    return Models(export(folder, tokenizer=False).folder, folder / "source")


def run_models(models: Models, folder: Path, **changes: Any) -> RunState:
    return run(models.folder, models.original, folder, **changes)[0]


def without_time(state: RunState) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in state.steps]


@pytest.fixture(scope="module")
def whole(models: Models, tmp_path_factory: pytest.TempPathFactory) -> RunState:
    return run_models(models, tmp_path_factory.mktemp("whole"))


def test_it_learns_and_says_how(whole: RunState) -> None:
    assert [row["step"] for row in whole.steps] == [1, 2, 3, 4, 5, 6]
    assert [step for step, *_ in whole.held_out] == [0, 2, 4, 6]
    assert whole.held_out[-1][1] < 0.99 * whole.held_out[0][1]
    assert all(row["tokens_per_second"] > 0 and row["gradient_norm"] > 0 for row in whole.steps)
    assert whole.elapsed > 0


@pytest.mark.parametrize("size", [1, 3, 4])
def test_micro_batches_change_nothing(size: int, whole: RunState, models: Models, tmp_path: Path) -> None:
    found = run_models(models, tmp_path, micro_batch=size)
    assert curve(found) == pytest.approx(curve(whole), rel=1e-5)


def test_gradient_checkpointing_changes_nothing(whole: RunState, models: Models, tmp_path: Path) -> None:
    assert curve(run_models(models, tmp_path, gradient_checkpointing=True)) == pytest.approx(
        curve(whole), rel=1e-5
    )


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    whole: RunState, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Checkpoints, state: RunState, *tensors: Any) -> None:
        save(self, state, *tensors)
        if state.step == 4:
            raise KeyboardInterrupt

    save = Checkpoints.save
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run_models(models, tmp_path)
    again = run_models(models, tmp_path)
    assert without_time(again) == without_time(whole)
    assert again.held_out == whole.held_out
    # One that is done is not trained again.
    assert run_models(models, tmp_path) == again


def test_another_seed_is_another_order(whole: RunState, models: Models, tmp_path: Path) -> None:
    other = run_models(models, tmp_path, seed=1)
    assert other.held_out[0] == whole.held_out[0]
    assert curve(other)[0] != curve(whole)[0]


def test_a_diverged_training_is_said(models: Models, tmp_path: Path) -> None:
    with pytest.raises(CareError, match=r"loss is nan at step .*lower --learning-rate than 1e\+30"):
        run_models(models, tmp_path, learning_rate=1e30, warmup=0.0, max_grad_norm=1e30)
    found = Checkpoints(Workspace(tmp_path)).newest()
    assert found is not None
    assert found[0].step == 0


def test_it_ends_when_it_gets_no_better(models: Models, tmp_path: Path) -> None:
    # With nothing to gain: the student is trained away from the teacher, towards random labels.
    state = run_models(
        models, tmp_path, beta=0.0, cross_entropy=1.0, learning_rate=0.03, patience=2, save_every=1, steps=50
    )
    best = state.best[0]
    assert state.step == best + 2 < 50


def test_weight_decay_is_for_matrices(models: Models) -> None:
    parameters = {"w": nn.Parameter(torch.ones(2, 2)), "b": nn.Parameter(torch.ones(2))}
    optimizer = make_optimizer(parameters, options(weight_decay=0.1), torch.device("cpu"))
    decays = {tuple(group["params"][0].shape): group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {(2, 2): 0.1, (2,): 0.0}


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))])

    def rate(step: int, config: HealConfig, elapsed: float = 0.0) -> float:
        set_learning_rate(optimizer, RunState(step=step, elapsed=elapsed), config, sizes_of(config))
        return optimizer.param_groups[0]["lr"]

    by_steps = options(steps=100, warmup=0.1, learning_rate=1.0)
    rates = [rate(step, by_steps) for step in range(100)]
    assert rates[:10] == pytest.approx([0.05 + 0.1 * i for i in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[54] == pytest.approx(0.5, abs=0.02)
    assert rates[99] < 1e-3
    # With minutes, time is the measure, and what is nearer to its end counts.
    by_time = options(steps=None, minutes=10.0, warmup=0.0, learning_rate=1.0)
    assert rate(7, by_time, elapsed=300.0) == pytest.approx(0.5)
    both = options(steps=100, minutes=10.0, warmup=0.0, learning_rate=1.0)
    assert rate(10, both, elapsed=300.0) == pytest.approx(0.5)
    assert rate(75, both, elapsed=300.0) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.755)))
    assert rate(3, options(warmup=1.0, steps=6, learning_rate=1.0)) == pytest.approx(3.5 / 6)


def test_when_it_is_over() -> None:
    kl = [(0, 3.0, 0.0), (10, 2.0, 0.0), (20, 2.5, 0.0), (30, 2.0, 0.0)]
    state = RunState(step=30, elapsed=59.0, held_out=kl)

    def over(state: RunState, **changes: Any) -> bool:
        config = options(**changes)
        return is_over(state, config, sizes_of(config))

    assert not over(state, steps=31, patience=3)
    assert over(state, steps=30)
    assert over(state, steps=99, patience=2)  # 30 is no better than 10
    assert not over(state, steps=99, patience=0)
    assert not over(state, steps=None, minutes=1.0, patience=0)
    assert over(replace(state, elapsed=60.0), steps=None, minutes=1.0, patience=0)
