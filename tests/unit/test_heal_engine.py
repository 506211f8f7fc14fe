"""Both models on a device: what they share, what trains, what a checkpoint holds of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from care_mla.errors import OptionError
from care_mla.heal.engine import (
    Distiller,
    copies,
    make_accelerator,
    optimizer_tensors,
    place,
    restore,
    trained_parameters,
)
from care_mla.heal.loss import LossWeights
from care_mla.heal.student import StudentFolder, choose_weights
from export_cases import export, token_ids
from heal_cases import options
from latent_models import load


@pytest.fixture(autouse=True)
def _other_device_each_time() -> None:
    """Accelerate keeps the device of its first use, and some tests are of a CPU on any machine."""
    AcceleratorState._reset_state(reset_partial_state=True)


def distiller(folder: Path, train: str = "attention") -> Distiller:
    student = StudentFolder(folder / "out").load_student()
    choose_weights(student, train, 4, 0)
    return Distiller(student, load(folder / "source"), LossWeights())


def storages(model: torch.nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in model.parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_weights_that_both_models_have_are_held_once(dtype: torch.dtype, tmp_path: Path) -> None:
    export(tmp_path, dtype, tokenizer=False)
    both = distiller(tmp_path)
    before = both(token_ids()).total
    # The stream of the folder is scaled, so its float32 weights come back but for the last bit.
    names = dict(both.teacher.named_parameters())
    down = "model.layers.0.mlp.down_proj.weight"
    is_equal = torch.equal(dict(both.student.named_parameters())[down], names[down])
    place(both, Accelerator(cpu=True), options())
    shared = storages(both.student) & storages(both.teacher)
    # Weights rounded to bfloat16 are others, and healing must see them.
    if dtype == torch.float32:
        assert not is_equal
        assert len(shared) == len([name for name in names if ".self_attn." not in name])
    else:
        assert dict(both.student.named_parameters())[down].data_ptr() not in shared
    torch.testing.assert_close(both(token_ids()).total, before)


def test_what_trains_is_shared_with_nobody(tmp_path: Path) -> None:
    export(tmp_path, tokenizer=False)
    both = distiller(tmp_path, "all")
    place(both, Accelerator(cpu=True), options(train="all"))
    assert not storages(both.student) & storages(both.teacher)


def test_an_optimiser_comes_back_to_the_bit(tmp_path: Path) -> None:
    export(tmp_path, tokenizer=False)
    first, second = distiller(tmp_path), distiller(tmp_path)
    parameters = trained_parameters(first)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    for seed in range(2):
        first(token_ids(seed=seed)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    others = trained_parameters(second)
    other = torch.optim.AdamW(others.values(), lr=1e-3)
    accelerator = Accelerator(cpu=True)
    moments = copies(optimizer_tensors(optimizer, parameters), accelerator)
    restore(other, others, copies(parameters, accelerator), moments)
    for model, opt in ((first, optimizer), (second, other)):
        model(token_ids(seed=5)).total.backward()
        opt.step()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, others[name]), name


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_a_precision_that_training_has_not_is_refused(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(OptionError, match=f"--mixed_precision {precision}"):
        make_accelerator(options(), tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no GPU"):
        make_accelerator(options(device="cuda"), tmp_path)


def test_layers_of_unequal_ranks_are_compiled_without_their_attention(tmp_path: Path) -> None:
    export(tmp_path, tokenizer=False)
    equal, unequal = distiller(tmp_path), distiller(tmp_path)
    unequal.student.config.kv_lora_rank = [8, 4]
    for both in (equal, unequal):
        place(both, Accelerator(cpu=True), options(compile=True))
    compiled = [
        {name for name, part in both.named_modules() if part._compiled_call_impl is not None}
        for both in (equal, unequal)
    ]
    layers = {f"{model}.model.layers.{i}" for model in ("student", "teacher") for i in (0, 1)}
    assert compiled[0] == layers
    assert compiled[1] > {name for name in layers if name.startswith("teacher")}
    assert "student.model.layers.1.mlp" in compiled[1]
    assert not any(name.endswith("self_attn") for name in compiled[1])


@pytest.mark.gpu
def test_compiled_in_bfloat16_it_trains_as_it_does_in_float32(tmp_path: Path) -> None:
    export(tmp_path, tokenizer=False)
    tokens_BL = token_ids(8, 64).cuda()
    accelerator = make_accelerator(options(), tmp_path)
    exact = distiller(tmp_path).cuda()
    model = place(distiller(tmp_path), accelerator, options(compile=True))
    with accelerator.autocast():
        losses = model(tokens_BL)
    losses.total.backward()
    expected = exact(tokens_BL)
    expected.total.backward()
    torch.testing.assert_close(losses.kl, expected.kl, rtol=0.02, atol=0.0)
    for name, parameter in trained_parameters(exact).items():
        found = trained_parameters(model)[name].grad
        assert ((found - parameter.grad).norm() / parameter.grad.norm()).item() < 0.05, name
