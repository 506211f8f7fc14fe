"""The plan of a healing and the speed of one, on published sizes and against counted ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from care_mla.errors import OptionError
from care_mla.heal.engine import Distiller
from care_mla.heal.loss import LossWeights
from care_mla.heal.memory import count_parameters, memory_plan, plan_rows
from care_mla.heal.sizes import Sizes, resolve_sizes, settled
from care_mla.heal.speed import flops_per_token, peak_flops
from care_mla.heal.student import StudentFolder, choose_weights
from care_mla.heal_config import HealConfig
from export_cases import export
from latent_models import load

GIB = 2**30


def options(**changes: Any) -> HealConfig:
    return HealConfig(**({"model": Path("OUT"), "output": Path("HEALED"), "teacher": "demo"} | changes))


def pico(tmp_path: Path, **changes: Any) -> tuple[StudentFolder, HealConfig]:
    return StudentFolder(export(tmp_path, tokenizer=False).folder), options(**changes)


@pytest.mark.parametrize("train", ["attention", "attention+norms", "all", "lora"])
def test_parameters_are_those_of_the_live_models(train: Any, tmp_path: Path) -> None:
    folder, config = pico(tmp_path, train=train)
    facts = folder.training_facts
    found = count_parameters(facts, folder.student_config(), facts, config)
    student = folder.load_student()
    assert found.student == sum(p.numel() for p in student.parameters())
    choose_weights(student, train, config.lora_rank, 0)
    assert found.trained == sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert found.teacher == sum(p.numel() for p in load(tmp_path / "source").parameters())
    assert found.key_width == 10 + 8


@pytest.mark.parametrize(
    ("changes", "on_gpu", "expected"),
    [
        ({}, False, Sizes(256, 65_536, 4_096, 8, 8, 200, 20)),
        ({}, True, Sizes(1024, 4_194_304, 65_536, 32, 16, 200, 20)),
        ({"steps": 20, "batch_size": 4}, False, Sizes(256, 20 * 4 * 256 + 4_096, 4_096, 4, 4, 20, 5)),
        (
            {"minutes": 5.0, "sequence_length": 512},
            True,
            Sizes(512, 4_194_304, 65_536, 32, 32, None, 50),
        ),
        (
            {"tokens": 999, "held_out_tokens": 100, "micro_batch_size": 3, "save_every": 7},
            True,
            Sizes(1024, 999, 100, 32, 3, 200, 7),
        ),
    ],
)
def test_sizes_that_the_device_decides(
    changes: dict[str, Any], on_gpu: bool, expected: Sizes, tmp_path: Path
) -> None:
    facts = replace(pico(tmp_path)[0].training_facts, max_position_embeddings=8192)
    found = resolve_sizes(facts, options(**changes), on_gpu=on_gpu)
    assert found == expected
    # A recipe with these numbers in it means the same on another device.
    again = resolve_sizes(facts, settled(options(**changes), found), on_gpu=not on_gpu)
    assert replace(again, micro_batch=found.micro_batch) == found


def test_sizes_stay_within_the_model_and_the_process(tmp_path: Path) -> None:
    facts = replace(pico(tmp_path)[0].training_facts, max_position_embeddings=128)
    sizes = resolve_sizes(facts, options(), on_gpu=False, processes=3)
    assert (sizes.sequence_length, sizes.batch_size, sizes.micro_batch) == (128, 9, 3)
    with pytest.raises(OptionError, match=r"--batch-size 8 .* over 3 processes\. Try --batch-size 9"):
        resolve_sizes(facts, options(batch_size=8), on_gpu=False, processes=3)


def test_what_costs_memory_and_what_saves_it(tmp_path: Path) -> None:
    folder, config = pico(tmp_path)
    facts = folder.training_facts

    def total(*, on_gpu: bool = True, shards: int = 1, **changes: Any) -> dict[str, int]:
        changed = replace(config, **changes)
        parameters = count_parameters(facts, folder.student_config(), facts, changed)
        sizes = Sizes(256, 10**6, 1000, 8, 8, 100, 10)
        return memory_plan(facts, changed, sizes, parameters, on_gpu=on_gpu, shards=shards).memory

    plain = total()
    assert total(train="all")["AdamW's moments"] > 2 * plain["AdamW's moments"]
    assert total(train="lora", lora_rank=2)["AdamW's moments"] < plain["AdamW's moments"] / 4
    assert total(gradient_checkpointing=True)["activations"] < plain["activations"]
    both = total(hidden_states=1.0, attention_outputs=1.0)["activations"] - plain["activations"]
    # Two terms, two models, bfloat16, 2,048 tokens.
    assert both == 2 * 2 * 2 * 8 * 256 * facts.num_hidden_layers * facts.hidden_size
    assert total(shards=8)["gradients"] == plain["gradients"] // 8
    assert total(on_gpu=False)["activations"] == 2 * plain["activations"]


def test_the_table_says_steps_or_minutes(tmp_path: Path) -> None:
    folder, config = pico(tmp_path)
    facts = folder.training_facts
    for changes, said in (({"steps": 7}, "7"), ({"minutes": 2.5}, "as many as 2.5 minutes allow")):
        changed = replace(config, **changes)
        sizes = resolve_sizes(facts, changed, on_gpu=False)
        parameters = count_parameters(facts, folder.student_config(), facts, changed)
        planned = memory_plan(facts, changed, sizes, parameters, on_gpu=False)
        rows = {str(row[0]): row[1] for row in plan_rows(planned, changed, sizes, 2)}
        assert rows["steps"] == said
        assert rows["processes"] == 2


@pytest.mark.parametrize("train", ["attention", "all"])
def test_flops_are_those_that_torch_counts(train: str, tmp_path: Path) -> None:
    folder, _ = pico(tmp_path)
    facts, student, teacher = folder.training_facts, folder.load_student(), load(tmp_path / "source")
    choose_weights(student, train, 4, 0)
    batch, length = 2, 64
    distiller = Distiller(student, teacher, LossWeights(cross_entropy=0.0))
    student.set_attn_implementation("eager")
    teacher.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with counter:
        distiller(torch.randint(320, (batch, length))).total.backward()
    stated = flops_per_token(student, facts, length, key_width=18)
    # Eager attention computes what the mask hides too, values padded to the width of keys, and the lowest
    # layer leaves out the gradient of its inputs.
    assert counter.get_total_flops() / (batch * length) == pytest.approx(stated, rel=0.25)
    # Without attention's products, which the mask halves, the counts of weights are the same.
    products = 2 * length * 4 * (3 * (18 + 16) + 2 * 16)
    hidden = 2 * length * 4 * (3 * (18 + 18) + 2 * 16) * 2
    exact = counter.get_total_flops() / (batch * length) - hidden
    assert exact == pytest.approx(stated - products, rel=0.06)


def test_peaks_by_name() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_flops("cpu") is None
    assert peak_flops("Quadro T1000") is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"teacher": None}, "--teacher is missing"),
        ({"steps": 0}, "--steps 0"),
        ({"minutes": 0.0}, "--minutes 0.0"),
        ({"warmup": 1.5}, "--warmup 1.5"),
        ({"temperature": 0.0}, "--temperature 0.0"),
        ({"beta": 0.0}, "nothing to train"),
        ({"lora_rank": 8}, "--lora-rank 8 has no effect"),
        ({"train": "mlp"}, "'mlp'"),
    ],
)
def test_options_that_mean_nothing_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        options(**changes)
