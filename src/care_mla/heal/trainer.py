"""The training loop: batches, losses, steps, measurements on the held-out part, checkpoints.

All that is random is keyed by the seed and the step, so a run that was stopped goes on as if it had not been.
"""
# Shapes: B blocks, L positions.

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from care_mla import console as terminal
from care_mla.errors import CareError
from care_mla.heal.checkpoints import Checkpoints, RunState
from care_mla.heal.data import Blocks
from care_mla.heal.engine import (
    copies,
    gradients_stay,
    optimizer_tensors,
    restore,
    trained_parameters,
    whole,
)
from care_mla.heal.sizes import Sizes
from care_mla.heal_config import HealConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def train(
    model: nn.Module,
    blocks: Blocks,
    config: HealConfig,
    accelerator: Accelerator,
    checkpoints: Checkpoints,
    sizes: Sizes,
) -> RunState:
    """Train until the steps or the minutes are over, or the held-out KL has stopped falling.

    Args:
        model: a placed `Distiller`.

    Raises:
        CareError: the loss is no number any more.
    """
    parameters = trained_parameters(model)
    optimizer = make_optimizer(parameters, config, accelerator.device)
    state = RunState()
    with accelerator.main_process_first():  # it removes what is damaged
        found = checkpoints.newest()
    if found is not None:
        state, weights, optimizer_state = found
        restore(optimizer, parameters, weights, optimizer_state)
        terminal.current().note(f"Going on from step {state.step}.")
    _check_agreement(state, accelerator, checkpoints)

    def measure_and_save() -> None:
        kl, cross_entropy = held_out_losses(model, blocks, accelerator, sizes.micro_batch)
        state.held_out.append((state.step, kl, cross_entropy))
        terminal.current().note(f"KL on held-out text at step {state.step}: {kl:.4f}")
        weights = copies(parameters, accelerator)
        moments = copies(optimizer_tensors(optimizer, parameters), accelerator)
        if accelerator.is_main_process:
            checkpoints.save(state, weights, moments)
        accelerator.wait_for_everyone()

    if not state.held_out:
        measure_and_save()
    share = sizes.batch_size // accelerator.num_processes
    with Progress(config, sizes, state) as progress:
        while not is_over(state, config, sizes):
            start = time.perf_counter()
            set_learning_rate(optimizer, state, config, sizes)
            first = state.step * sizes.batch_size + accelerator.process_index * share
            sums = torch.zeros(3, device=accelerator.device)
            for micro, (place, count) in enumerate(micro_batches(share, sizes.micro_batch), start=1):
                is_last = micro == math.ceil(share / sizes.micro_batch)
                tokens_BL = blocks.batch(first + place, count).to(accelerator.device)
                # Gradients travel between processes once per step.
                with gradients_stay(model, accelerator, stay=not is_last):
                    with accelerator.autocast():
                        losses = model(tokens_BL)
                    accelerator.backward(losses.total * (count / share))
                sums += torch.stack([loss.detach() for loss in losses]) * (count / share)
            norm = nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            loss, cross_entropy, kl = accelerator.reduce(sums, "mean").tolist()
            seconds = time.perf_counter() - start
            state.step += 1
            state.elapsed += agreed(seconds, accelerator, config)
            row = {
                "step": state.step,
                "loss": loss,
                "kl": kl,
                "cross_entropy": cross_entropy,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "gradient_norm": whole(norm).item(),
                "tokens_per_second": sizes.tokens_per_step / seconds,
            }
            if not math.isfinite(loss):
                raise CareError(
                    f"The loss is {loss} at step {state.step}: training has diverged. The checkpoints before "
                    "are kept. Train again, in another work folder, with a lower --learning-rate than "
                    f"{config.learning_rate:g}"
                )
            state.steps.append(row)
            accelerator.log({f"heal/{key}": value for key, value in row.items()}, step=state.step)
            if state.step % sizes.save_every == 0 or is_over(state, config, sizes):
                measure_and_save()
                accelerator.log({"heal/held_out_kl": state.held_out[-1][1]}, step=state.step)
            progress.show(row)
    return state


def _check_agreement(state: RunState, accelerator: Accelerator, checkpoints: Checkpoints) -> None:
    """Check that all processes go on from the same step.

    Raises:
        CareError: they see other checkpoints.
    """
    steps = gather_object([state.step])
    if len(set(steps)) > 1:
        raise CareError(
            f"{checkpoints.folder}: processes find checkpoints of steps {steps} there, so this folder is not "
            "one for all of them. Name one on a disk that all machines share: --work FOLDER"
        )


def micro_batches(share: int, size: int) -> Iterator[tuple[int, int]]:
    """(first block, number of blocks) of each forward pass of a process in one step."""
    return ((start, min(size, share - start)) for start in range(0, share, size))


def make_optimizer(
    parameters: dict[str, nn.Parameter], config: HealConfig, device: torch.device
) -> torch.optim.AdamW:
    """AdamW, with weight decay on matrices alone."""
    groups = [
        {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    is_fused = device.type == "cuda"
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=is_fused or None)


def is_over(state: RunState, config: HealConfig, sizes: Sizes) -> bool:
    """Whether training ends here: by steps, by time, or because it does not get better."""
    is_stale = bool(config.patience) and state.measurements_since_best >= config.patience
    return (
        (sizes.steps is not None and state.step >= sizes.steps)
        or (config.minutes is not None and state.elapsed >= 60 * config.minutes)
        or is_stale
    )


def done_share(state: RunState, config: HealConfig, sizes: Sizes, ahead: float = 0.0) -> float:
    """How much of the run is over, from 0 to 1; `ahead` steps further on."""
    by_steps = (state.step + ahead) / sizes.steps if sizes.steps else 0.0
    by_time = state.elapsed / (60 * config.minutes) if config.minutes else 0.0
    return min(1.0, max(by_steps, by_time))


def set_learning_rate(
    optimizer: torch.optim.Optimizer, state: RunState, config: HealConfig, sizes: Sizes
) -> None:
    """Linear warm-up, then a cosine to 0, of the middle of the coming step."""
    done = done_share(state, config, sizes, ahead=0.5)
    if done < config.warmup:
        factor = done / config.warmup
    else:
        factor = 0.5 * (1 + math.cos(math.pi * (done - config.warmup) / max(1e-9, 1 - config.warmup)))
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * factor


def agreed(seconds: float, accelerator: Accelerator, config: HealConfig) -> float:
    """The first process's seconds, where time decides: all must end at the same step."""
    if config.minutes is None or accelerator.num_processes == 1:
        return seconds
    box = [seconds]
    broadcast_object_list(box)
    return box[0]


def held_out_losses(
    model: nn.Module, blocks: Blocks, accelerator: Accelerator, micro_batch: int
) -> tuple[float, float]:
    """Mean KL and cross-entropy over the held-out blocks, in nats per token, at temperature 1."""
    tokens_BL = blocks.held_out_BL
    ranks, rank = accelerator.num_processes, accelerator.process_index
    model.eval()
    sums = torch.zeros(3, device=accelerator.device)
    for start in range(0, len(tokens_BL), micro_batch * ranks):
        mine_BL = tokens_BL[start + rank * micro_batch :][:micro_batch]
        # Every process runs as many passes, since sharded weights are gathered together; some count nothing.
        batch_BL = mine_BL if len(mine_BL) else tokens_BL[:1]
        with torch.no_grad(), accelerator.autocast():
            losses = model(batch_BL.to(accelerator.device))
        sums += torch.stack([losses.kl, losses.cross_entropy, torch.ones_like(losses.kl)]) * len(mine_BL)
    model.train()
    kl, cross_entropy, count = accelerator.reduce(sums, "sum").tolist()
    return kl / count, cross_entropy / count


class Progress:
    """The bar: loss, KL, tokens per second, time left."""

    def __init__(self, config: HealConfig, sizes: Sizes, state: RunState) -> None:
        self.config, self.sizes, self.state = config, sizes, state
        total = sizes.steps or math.ceil(60 * (config.minutes or 0))
        self._context = terminal.current().progress("Healing", total)

    def __enter__(self) -> Progress:
        self._progress = self._context.__enter__()
        self._first, self._begun = done_share(self.state, self.config, self.sizes), time.perf_counter()
        if self.state.step:
            self._progress.advance(self._position(), "as the checkpoint has it")
        return self

    def __exit__(self, *exception: object) -> None:
        self._context.__exit__(*exception)  # type: ignore[arg-type]

    def show(self, row: dict[str, float]) -> None:
        """Show a step that is done."""
        share = done_share(self.state, self.config, self.sizes)
        passed = time.perf_counter() - self._begun
        left = passed * (1 - share) / max(1e-9, share - self._first)
        text = (
            f"loss {row['loss']:.3f}  KL {row['kl']:.3f}  {row['tokens_per_second']:,.0f} tokens/s  "
            f"{left / 60:.1f} min left"
        )
        self._progress.advance(self._position() - self._progress.done, text)

    def _position(self) -> int:
        return self.state.step if self.sizes.steps else int(self.state.elapsed)
