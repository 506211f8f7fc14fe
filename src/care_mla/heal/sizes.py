"""Numbers that the options leave open: settled by the device, the processes, and the model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from care_mla.errors import OptionError
from care_mla.facts import ModelFacts
from care_mla.heal_config import HealConfig

CPU_TOKENS, GPU_TOKENS = 65_536, 4_194_304
CPU_HELD_OUT, GPU_HELD_OUT = 4_096, 65_536
CPU_LENGTH, GPU_LENGTH = 256, 1_024
CPU_BATCH, GPU_BATCH = 8, 32
CPU_PASS, GPU_PASS = 2_048, 16_384
DEFAULT_STEPS = 200
# With --minutes alone the number of steps is not known; a step takes less time than measuring does.
SAVE_EVERY, LEAST_SAVE_EVERY = 50, 5


@dataclass(frozen=True)
class Sizes:
    """Lengths and numbers of a run.

    Attributes:
        tokens: distinct ones, of each text.
        held_out_tokens: of all texts together.
        batch_size: blocks of a step, over all processes.
        micro_batch: blocks of one forward pass of a process.
        steps: None where time alone ends the run.
        save_every: steps between two measurements, each with a checkpoint.
    """

    sequence_length: int
    tokens: int
    held_out_tokens: int
    batch_size: int
    micro_batch: int
    steps: int | None
    save_every: int

    @property
    def tokens_per_step(self) -> int:
        """Over all processes."""
        return self.batch_size * self.sequence_length


def resolve_sizes(facts: ModelFacts, config: HealConfig, *, on_gpu: bool, processes: int = 1) -> Sizes:
    """The options, or their defaults.

    Raises:
        OptionError: the batch cannot be shared evenly.
    """
    default_batch = GPU_BATCH if on_gpu else CPU_BATCH
    batch_size = config.batch_size or processes * -(-default_batch // processes)
    if batch_size % processes:
        raise OptionError(
            f"--batch-size {batch_size} cannot be split evenly over {processes} processes. Try "
            f"--batch-size {processes * -(-batch_size // processes)}"
        )
    length = config.sequence_length or (GPU_LENGTH if on_gpu else CPU_LENGTH)
    length = min(length, facts.max_position_embeddings)
    held_out = config.held_out_tokens or (GPU_HELD_OUT if on_gpu else CPU_HELD_OUT)
    steps = config.steps or (None if config.minutes else DEFAULT_STEPS)
    most = GPU_TOKENS if on_gpu else CPU_TOKENS
    used = most if steps is None else min(most, steps * batch_size * length + held_out)
    micro_batch = config.micro_batch_size or max(1, (GPU_PASS if on_gpu else CPU_PASS) // length)
    return Sizes(
        sequence_length=length,
        tokens=config.tokens or used,
        held_out_tokens=held_out,
        batch_size=batch_size,
        micro_batch=min(micro_batch, batch_size // processes),
        steps=steps,
        save_every=config.save_every or (max(LEAST_SAVE_EVERY, steps // 10) if steps else SAVE_EVERY),
    )


def settled(config: HealConfig, sizes: Sizes) -> HealConfig:
    """The options with these numbers in them, for a recipe that does the same on every device."""
    return replace(
        config,
        sequence_length=sizes.sequence_length,
        tokens=sizes.tokens,
        held_out_tokens=sizes.held_out_tokens,
        batch_size=sizes.batch_size,
        steps=sizes.steps,
        save_every=sizes.save_every,
    )
