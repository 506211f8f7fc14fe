"""The healing loss: cross-entropy and the divergence from the teacher, without all logits in memory.

Exact over the whole vocabulary. Logits exist for a few rows at a time, and their gradient is turned into that
of the hidden states (and of the head, if it trains) before the next rows come.
"""
# Shapes: T tokens, C tokens of one chunk, D hidden_size, S vocabulary.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Float32 logits of one chunk, of which a few copies exist at a time; GPUs are quicker on more rows.
CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**29}


class LossWeights(NamedTuple):
    """The paper's loss (§3.4), CE + beta tau^2 KL(teacher || student), with a weight on CE."""

    cross_entropy: float = 1.0
    beta: float = 1.0
    temperature: float = 1.0


class Losses(NamedTuple):
    """Means over the tokens. Only `total` has a gradient; `kl` is at the temperature, without its square."""

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor


def distillation_loss(
    student_TD: Tensor,
    student_head_SD: Tensor,
    teacher_TD: Tensor,
    teacher_head_SD: Tensor,
    labels_T: Tensor,
    weights: LossWeights,
    *,
    chunk_rows: int | None = None,
    chunk_loss: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Losses:
    """The loss of packed tokens from the last hidden states (after the final norm) of both models.

    Args:
        student_TD: with a gradient; in the type in which logits are computed (their sums are float32).
        student_head_SD: likewise, if it trains.
        labels_T: the next token of every position.
        chunk_rows: tokens whose logits exist together. None: as `rows_of_chunk` says.
        chunk_loss: in place of `loss_of_chunk`, such as its compiled form.
    """
    if not torch.is_grad_enabled():
        student_head_SD = student_head_SD.detach()
    means_2, total = _Distillation.apply(
        student_TD, student_head_SD, teacher_TD, teacher_head_SD, labels_T, weights,
        chunk_rows or rows_of_chunk(len(labels_T), len(student_head_SD), student_TD.device.type),
        chunk_loss or loss_of_chunk,
    )  # fmt: skip
    return Losses(total, means_2[0], means_2[1])


def rows_of_chunk(tokens: int, vocab_size: int, device_type: str) -> int:
    """Tokens of one chunk: all chunks but the last are equal, and the last is hardly smaller."""
    most = max(1, CHUNK_BYTES.get(device_type, CHUNK_BYTES["cpu"]) // (4 * vocab_size))
    return -(-tokens // -(-tokens // most))


def loss_of_chunk(
    logits_CS: Tensor, teacher_CS: Tensor, labels_C: Tensor, weights: LossWeights, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of CE and of KL over the rows, and the gradient of the weighted mean by the student's logits.

    With p, q the distributions at the temperature tau: d CE / dz = softmax(z) - label and
    d (tau^2 KL) / dz = tau (q - p). Casts are made here, so that compiled they take no pass over memory of
    their own.

    Args:
        logits_CS: in any type, which the gradient has too; likewise the teacher's. Sums are float32.
        tokens: the mean is over so many, those of all chunks.
    """
    tau = weights.temperature
    dtype = logits_CS.dtype
    logits_CS, teacher_CS = logits_CS.float(), teacher_CS.float()
    log_p_CS = torch.log_softmax(teacher_CS / tau, dim=-1)
    log_q_CS = torch.log_softmax(logits_CS / tau, dim=-1)
    p_CS, q_CS = log_p_CS.exp(), log_q_CS.exp()
    kl = (p_CS * (log_p_CS - log_q_CS)).sum()
    gradient_CS = (weights.beta * tau) * (q_CS - p_CS)
    log_s_CS = log_q_CS if tau == 1 else torch.log_softmax(logits_CS, dim=-1)
    cross_entropy = -log_s_CS.gather(1, labels_C[:, None]).sum()
    if weights.cross_entropy:
        softmax_CS = q_CS if tau == 1 else log_s_CS.exp()
        ones_C1 = torch.ones_like(labels_C, dtype=softmax_CS.dtype)[:, None]
        gradient_CS = gradient_CS + weights.cross_entropy * softmax_CS.scatter_add(
            1, labels_C[:, None], -ones_C1
        )
    return cross_entropy, kl, (gradient_CS / tokens).to(dtype)


class _Distillation(torch.autograd.Function):
    """Gradients are computed with the loss, chunk by chunk, and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        student_TD: Tensor,
        student_head_SD: Tensor,
        teacher_TD: Tensor,
        teacher_head_SD: Tensor,
        labels_T: Tensor,
        weights: LossWeights,
        rows: int,
        chunk_loss: Callable[..., tuple[Tensor, Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        count = len(labels_T)
        needs_states, needs_head = ctx.needs_input_grad[:2]
        head_SD = student_head_SD.to(student_TD.dtype)
        head_of_teacher_SD = teacher_head_SD.to(teacher_TD.dtype)
        grad_TD = torch.empty_like(student_TD) if needs_states else None
        grad_SD = torch.zeros_like(student_head_SD, dtype=torch.float32) if needs_head else None
        sums_2 = student_TD.new_zeros(2, dtype=torch.float32)
        # Products stay in the type of the hidden states, whatever autocast would make of them.
        with torch.autocast(student_TD.device.type, enabled=False):
            for start in range(0, count, rows):
                chunk = slice(start, start + rows)
                states_CD = student_TD[chunk]
                cross_entropy, kl, gradient_CS = chunk_loss(
                    states_CD @ head_SD.T,
                    teacher_TD[chunk] @ head_of_teacher_SD.T,
                    labels_T[chunk].clone(),  # of its own: torch.compile tells offsets into one tensor apart
                    weights,
                    count,
                )
                sums_2 += torch.stack((cross_entropy, kl))
                if grad_TD is not None:
                    grad_TD[chunk] = gradient_CS @ head_SD
                if grad_SD is not None:
                    grad_SD += gradient_CS.T @ states_CD
        ctx.save_for_backward(grad_TD, None if grad_SD is None else grad_SD.to(student_head_SD.dtype))
        means = sums_2 / count
        factor_2 = means.new_tensor([weights.cross_entropy, weights.beta * weights.temperature**2])
        ctx.mark_non_differentiable(means)
        return means, (means * factor_2).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        _, grad = grad_outputs
        grad_TD, grad_SD = ctx.saved_tensors
        scaled = [None if g is None else g * grad.to(g.dtype) for g in (grad_TD, grad_SD)]
        return (*scaled, None, None, None, None, None, None)
