"""The term on attention's outputs: its value, what it trains, compiled and with checkpointing."""
# Shapes: B blocks, L positions, D hidden_size.

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from care_mla.heal.attention_outputs import relative_difference
from care_mla.heal.engine import Distiller, place
from care_mla.heal.loss import LossWeights
from export_cases import export, token_ids
from heal_cases import options, run
from latent_models import load, random_model

from pico import pico_model

NOTHING_ELSE = LossWeights(cross_entropy=0.0, beta=0.0)


def models(
    folder: Path, form: str = "decoupled", **source: object
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and teacher."""
    teacher = load(pico_model(folder, tokenizer=False, **source))  # type: ignore[arg-type]
    return random_model(teacher, form), teacher


def outputs(model: PreTrainedModel, tokens_BL: Tensor) -> list[Tensor]:
    """What attention adds to the residual stream in each layer, from the streams around it: (B, L, D)."""
    found: list[Tensor] = []
    for layer_idx, layer in enumerate(model.model.layers):
        before_BLD = model.model(tokens_BL, output_hidden_states=True).hidden_states[layer_idx]
        with torch.no_grad():
            positions = torch.arange(tokens_BL.shape[1])[None]
            rotary = model.model.rotary_emb(before_BLD, positions)
            length = tokens_BL.shape[1]
            mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
            normed = layer.input_layernorm(before_BLD)
            found.append(layer.self_attn(normed, rotary, attention_mask=mask, position_ids=positions)[0])
    return found


@pytest.mark.parametrize("form", ["exact-rope", "decoupled", "partial-rope"])
def test_it_is_a_term_of_its_own(form: str, tmp_path: Path) -> None:
    student, teacher = models(tmp_path / "model", form)
    tokens_BL = token_ids(2, 9)
    weights = LossWeights(cross_entropy=0.0, beta=1.0)
    without = Distiller(student, teacher, weights)(tokens_BL).total
    with_outputs = Distiller(student, teacher, weights, attention_outputs=0.25)(tokens_BL).total
    apart = [
        (a - b).square().sum(-1) / b.square().sum(-1)
        for a, b in zip(outputs(student, tokens_BL), outputs(teacher, tokens_BL), strict=True)
    ]
    assert len(apart) == 2
    torch.testing.assert_close(with_outputs - without, 0.25 * torch.stack(apart).mean(), rtol=1e-4, atol=1e-5)


def test_it_trains_attention_alone_with_all_below_it(tmp_path: Path) -> None:
    student, teacher = models(tmp_path / "model")
    Distiller(student, teacher, NOTHING_ELSE, attention_outputs=1.0)(token_ids()).total.backward()
    for name in ("q_proj", "kv_a_proj_with_mqa", "k_b_proj", "v_b_proj", "o_proj"):
        for layer in student.model.layers:
            assert layer.self_attn.get_submodule(name).weight.grad.abs().max() > 0, name
    # No attention comes after the last MLP.
    assert student.model.layers[0].mlp.down_proj.weight.grad.abs().max() > 0
    assert not student.model.layers[1].mlp.down_proj.weight.grad.any()


def test_a_weight_of_zero_costs_nothing(tmp_path: Path) -> None:
    student, teacher = models(tmp_path / "model")
    distiller = Distiller(student, teacher, LossWeights())
    distiller(token_ids())
    for model in (student, teacher):
        for layer in model.model.layers:
            assert not layer.self_attn._forward_hooks
            assert not hasattr(layer.self_attn, "kept_output")


# Dynamo looks at it, and this suite makes errors of warnings.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_however_it_is_computed_it_is_the_same(checkpointing: bool, compiled: bool, tmp_path: Path) -> None:
    export(tmp_path, tokenizer=False)
    gradients, losses = [], []
    for is_plain in (True, False):
        student = random_model(load(tmp_path / "source"), "decoupled")
        distiller = Distiller(student, load(tmp_path / "source"), LossWeights(), 0.1, 0.5)
        changes = {} if is_plain else {"gradient_checkpointing": checkpointing}
        place(distiller, Accelerator(cpu=True), options(**changes))
        if compiled and not is_plain:
            for layer in (*distiller.student.model.layers, *distiller.teacher.model.layers):
                layer.compile(backend="aot_eager")
        for _ in range(2):  # what one pass keeps is nothing to the next
            distiller.zero_grad()
            loss = distiller(token_ids()).total
            loss.backward()
        for layer in (*distiller.student.model.layers, *distiller.teacher.model.layers):
            assert layer.self_attn.kept_output is None
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in distiller.student.named_parameters()})
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_training_for_it_brings_outputs_together(tmp_path: Path) -> None:
    export(tmp_path, tokenizer=False)
    state, _ = run(
        tmp_path / "out", tmp_path / "source", tmp_path / "work",
        beta=0.0, attention_outputs=1.0, steps=30, save_every=30, learning_rate=3e-3,
    )  # fmt: skip
    losses = [row["loss"] for row in state.steps]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_the_difference_is_relative_to_each_token() -> None:
    taught = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    learnt = taught * torch.tensor([1.1, 1.2])
    expected = ((0.3**2 + 0.8**2) / 25 + (30**2 + 80**2) / 250_000) / 2
    assert relative_difference([learnt], [taught]).item() == pytest.approx(expected, rel=1e-5)
