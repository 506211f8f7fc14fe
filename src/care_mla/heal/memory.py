"""What healing needs before it starts: tokens, memory by part, disk. Arithmetic on sizes alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from care_mla.facts import ModelFacts
from care_mla.heal.trainer import planned_steps, save_every
from care_mla.heal_config import HealConfig

CPU_TOKENS, GPU_TOKENS = 65_536, 4_194_304
CPU_HELD_OUT, GPU_HELD_OUT = 8_192, 65_536
CPU_LENGTH, GPU_LENGTH = 256, 1_024
CPU_PASS, GPU_PASS = 2_048, 16_384


@dataclass(frozen=True)
class Sizes:
    """Lengths and numbers that the options leave to the device."""

    sequence_length: int
    tokens: int
    held_out_tokens: int
    micro_batch: int


def resolve_sizes(facts: ModelFacts, config: HealConfig, *, on_gpu: bool, processes: int = 1) -> Sizes:
    """The options, or their defaults for the device and the steps."""
    length = config.sequence_length or (GPU_LENGTH if on_gpu else CPU_LENGTH)
    length = min(length, facts.max_position_embeddings)
    held_out = config.held_out_tokens or (GPU_HELD_OUT if on_gpu else CPU_HELD_OUT)
    steps = planned_steps(config)
    most = GPU_TOKENS if on_gpu else CPU_TOKENS
    used = most if steps is None else min(most, steps * config.batch_size * length + held_out)
    micro = config.micro_batch_size or max(1, (GPU_PASS if on_gpu else CPU_PASS) // length)
    return Sizes(length, config.tokens or used, held_out, min(micro, config.batch_size // processes))


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of one process, by part, and of the disk."""

    trained: int
    parameters: int
    memory: dict[str, int]
    disk: dict[str, int]

    @property
    def memory_bytes(self) -> int:
        """The sum of the parts."""
        return sum(self.memory.values())

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "memory_bytes": self.memory_bytes, "disk_bytes": sum(self.disk.values())}


def memory_plan(
    facts: ModelFacts,
    config: HealConfig,
    sizes: Sizes,
    *,
    student: int,
    trained: int,
    teacher: int,
    key_width: int,
    on_gpu: bool,
    shards: int = 1,
    itemsize: int = 2,
) -> MemoryPlan:
    """What a process holds.

    Args:
        student: parameters; likewise `teacher`, and `trained` of them.
        key_width: of the student's queries and keys, M + P.
        shards: processes that share the weights.
        itemsize: of the weights written.
    """
    width = 2 if on_gpu else 4
    frozen_width = 4 if shards > 1 else width
    # What both have is held once, but not where the weights are sharded.
    frozen = (student - trained) * (1 if shards > 1 else 0)
    tokens = sizes.micro_batch * sizes.sequence_length
    heads = facts.num_attention_heads
    in_layer = 8 * facts.hidden_size + 4 * facts.intermediate_size + 5 * heads * key_width
    layers = facts.num_hidden_layers
    activations = (
        in_layer + layers * facts.hidden_size if config.gradient_checkpointing else layers * in_layer
    )
    chunk = min(2**27, 4 * tokens * facts.vocab_size)
    memory = {
        "weights of both models": (4 * trained + frozen_width * (teacher + frozen)) // shards,
        "gradients": 4 * trained // shards,
        "AdamW's moments": 8 * trained // shards,
        "activations": width * tokens * activations,
        "logits": 6 * chunk,
    }
    # The two newest, the best, and one that is being written.
    disk = {
        "checkpoints": 4 * 12 * trained,
        "tokens": 8 * sizes.tokens * len(config.sources()),
        "output": itemsize * student,
    }
    return MemoryPlan(trained=trained, parameters=student, memory=memory, disk=disk)


def plan_rows(plan: MemoryPlan, config: HealConfig, sizes: Sizes, processes: int) -> list[list[object]]:
    """The table that is shown before training."""
    steps = planned_steps(config)
    per_step = config.batch_size * sizes.sequence_length
    return [
        ["trained", f"{plan.trained:,} of {plan.parameters:,} ({config.train})"],
        ["steps", f"{steps:,}" if steps else f"as many as {config.minutes:g} minutes allow"],
        ["tokens per step", f"{per_step:,} ({config.batch_size} x {sizes.sequence_length})"],
        ["tokens in all", f"{steps * per_step:,}" if steps else "-"],
        ["distinct tokens of each text", f"up to {sizes.tokens:,}"],
        ["checkpoint", f"every {save_every(config):,} steps"],
        ["processes", processes],
        ["memory of each", _gib(plan.memory_bytes)],
        *[[f"  {part}", _gib(nbytes)] for part, nbytes in plan.memory.items()],
        ["disk", _gib(sum(plan.disk.values()))],
        *[[f"  {part}", _gib(nbytes)] for part, nbytes in plan.disk.items()],
    ]


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
