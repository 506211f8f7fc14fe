"""A training of a converted pico model, for tests in one process and in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from care_mla.heal.checkpoints import Checkpoints, RunState
from care_mla.heal.data import Blocks, split_corpus
from care_mla.heal.engine import Distiller, place
from care_mla.heal.loss import LossWeights
from care_mla.heal.sizes import Sizes
from care_mla.heal.student import StudentFolder, choose_weights
from care_mla.heal.trainer import train
from care_mla.heal_config import HealConfig
from care_mla.workspace import Workspace
from export_cases import token_ids
from latent_models import load


def options(**changes: Any) -> HealConfig:
    """Six steps of four blocks, measured every second one."""
    defaults: dict[str, Any] = {
        "model": Path("OUT"), "output": Path("HEALED"), "teacher": "demo",
        "steps": 6, "batch_size": 4, "save_every": 2, "learning_rate": 1e-3,
    }  # fmt: skip
    return HealConfig(**(defaults | changes))


def sizes_of(config: HealConfig, micro_batch: int = 2) -> Sizes:
    """Of blocks of 12 tokens."""
    assert config.batch_size is not None
    return Sizes(12, 480, 48, config.batch_size, micro_batch, config.steps, config.save_every or 2)


def run(
    converted: Path, original: Path, work: Path, *, micro_batch: int = 2, **changes: Any
) -> tuple[RunState, Checkpoints]:
    """Train a converted folder towards its original on random tokens."""
    config, accelerator = options(**changes), Accelerator(cpu=True)
    student = StudentFolder(converted).load_student()
    choose_weights(student, config.train, config.lora_rank, config.seed)
    weights = LossWeights(config.cross_entropy, config.beta, config.temperature)
    distiller = Distiller(student, load(original), weights, config.hidden_states, config.attention_outputs)
    model = place(distiller, accelerator, config)
    blocks = Blocks([split_corpus("t", 1.0, token_ids(40, 12).int(), 4, 0)], config.seed)
    checkpoints = Checkpoints(Workspace(work))
    return train(model, blocks, config, accelerator, checkpoints, sizes_of(config, micro_batch)), checkpoints


def curve(state: RunState) -> list[float]:
    """Losses of all steps, then all measurements."""
    return [row["loss"] for row in state.steps] + [kl for _, kl, _ in state.held_out]
