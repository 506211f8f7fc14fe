"""The healing loss against its formula: values, gradients, chunks, temperature, weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from care_mla.heal.engine import Distiller, stream_difference
from care_mla.heal.loss import LossWeights, distillation_loss, rows_of_chunk
from latent_models import load, random_model

from pico import pico_model

T, D, S = 23, 12, 40


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = {
        "student_TD": torch.randn(T, D, generator=generator, dtype=dtype),
        "student_head_SD": torch.randn(S, D, generator=generator, dtype=dtype),
        "teacher_TD": torch.randn(T, D, generator=generator, dtype=dtype),
        "teacher_head_SD": torch.randn(S, D, generator=generator, dtype=dtype),
    }
    for name in ("student_TD", "student_head_SD"):
        draw[name].requires_grad_(True)
    return draw | {"labels_T": torch.randint(S, (T,), generator=generator)}


def plain(case: dict[str, Tensor], weights: LossWeights) -> tuple[Tensor, Tensor, Tensor]:
    """The formula, with all logits at once."""
    student_TS = case["student_TD"] @ case["student_head_SD"].T
    teacher_TS = case["teacher_TD"] @ case["teacher_head_SD"].T
    tau = weights.temperature
    ce = cross_entropy(student_TS, case["labels_T"])
    log_q, log_p = (student_TS / tau).log_softmax(-1), (teacher_TS / tau).log_softmax(-1)
    kl = kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return weights.cross_entropy * ce + weights.beta * tau**2 * kl, ce, kl


WEIGHTS = [
    LossWeights(cross_entropy=1.0, beta=1.0, temperature=1.0),
    LossWeights(cross_entropy=0.0, beta=1.0, temperature=1.0),
    LossWeights(cross_entropy=1.0, beta=0.0, temperature=1.0),
    LossWeights(cross_entropy=0.5, beta=2.0, temperature=3.0),
    LossWeights(cross_entropy=0.0, beta=0.7, temperature=0.5),
]


@pytest.mark.parametrize("rows", [1, 7, T, 100])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_chunks_give_the_formula_and_its_gradients(weights: LossWeights, rows: int) -> None:
    case = inputs()
    expected = plain(case, weights)
    trained = [case["student_TD"], case["student_head_SD"]]
    gradients = torch.autograd.grad(expected[0], trained)
    # Gradients scale with what comes after the loss.
    losses = distillation_loss(**case, weights=weights, chunk_rows=rows)
    (3 * losses.total).backward()
    for found, wanted in zip(losses, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    for tensor, gradient in zip(trained, gradients, strict=True):
        torch.testing.assert_close(tensor.grad, 3 * gradient, rtol=1e-5, atol=1e-7)


def test_a_frozen_head_gets_no_gradient() -> None:
    case = inputs(torch.float32)
    case["student_head_SD"].requires_grad_(False)
    distillation_loss(**case, weights=LossWeights()).total.backward()
    assert case["student_head_SD"].grad is None
    assert case["student_TD"].grad is not None


def test_an_equal_student_has_no_divergence_and_no_gradient() -> None:
    case = inputs()
    case["teacher_TD"], case["teacher_head_SD"] = (
        case["student_TD"].detach(),
        case["student_head_SD"].detach(),
    )
    losses = distillation_loss(**case, weights=LossWeights(cross_entropy=0.0), chunk_rows=5)
    losses.total.backward()
    assert abs(losses.kl.item()) < 1e-6
    assert case["student_TD"].grad.abs().max() < 1e-8


def test_chunks_are_equal_and_stay_below_their_limit() -> None:
    for tokens, vocab in ((1, 10), (16_368, 49_152), (1000, 2**26), (2047, 128_256)):
        rows = rows_of_chunk(tokens, vocab, "cpu")
        assert 1 <= rows <= max(1, 2**27 // (4 * vocab))
        chunks = -(-tokens // rows)
        assert chunks * rows - tokens < chunks  # the last one lacks less than one row of each


def test_distiller_is_the_loss_of_both_models(tmp_path) -> None:
    teacher = load(pico_model(tmp_path / "model", tokenizer=False))
    student = random_model(teacher, "exact-rope")
    tokens_BL = torch.randint(320, (2, 9))
    weights = LossWeights(cross_entropy=0.5, beta=1.5, temperature=2.0)
    distiller = Distiller(student, teacher, weights)
    distiller.train()
    logits = {name: m(tokens_BL).logits[:, :-1].flatten(0, 1) for name, m in distiller.named_children()}
    log_q, log_p = ((logits[name] / 2).log_softmax(-1) for name in ("student", "teacher"))
    kl = kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    ce = cross_entropy(logits["student"], tokens_BL[:, 1:].flatten())
    losses = distiller(tokens_BL)
    torch.testing.assert_close(losses.total, 0.5 * ce + 1.5 * 4 * kl)
    # Measurements are of the divergence itself, whatever the temperature of training.
    distiller.eval()
    log_q, log_p = (logits[name].log_softmax(-1) for name in ("student", "teacher"))
    torch.testing.assert_close(
        distiller(tokens_BL).kl, kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    )


def test_hidden_states_are_a_term_of_their_own(tmp_path) -> None:
    teacher = load(pico_model(tmp_path / "model", tokenizer=False))
    student = random_model(teacher, "decoupled")
    tokens_BL = torch.randint(320, (2, 9))
    weights = LossWeights(cross_entropy=0.0, beta=1.0)
    distiller = Distiller(student, teacher, weights)
    without = distiller(tokens_BL).total
    distiller.hidden_states = 0.25
    with_states = distiller(tokens_BL).total
    apart = [
        (a - b).square().sum(-1) / b.square().sum(-1)
        for a, b in zip(
            student.model(tokens_BL, output_hidden_states=True).hidden_states[1:],
            teacher.model(tokens_BL, output_hidden_states=True).hidden_states[1:],
            strict=True,
        )
    ]
    assert len(apart) == 2
    torch.testing.assert_close(with_states - without, 0.25 * torch.stack(apart).mean())
    # The first layer's stream is moved by the first layer alone, and its term reaches its weights.
    distiller.weights = LossWeights(cross_entropy=0.0, beta=0.0)
    distiller(tokens_BL).total.backward()
    assert student.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_the_difference_of_streams_is_relative_to_each_token() -> None:
    taught = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    learnt = taught * torch.tensor([1.1, 1.2])
    expected = ((0.3**2 + 0.8**2) / 25 + (30**2 + 80**2) / 250_000) / 2
    found = stream_difference((taught, learnt), (taught, taught))
    assert found.item() == pytest.approx(expected, rel=1e-5)
