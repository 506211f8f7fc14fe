"""What healing needs before it starts: tokens, memory by part, disk. Arithmetic on sizes alone."""
# Letters: D hidden_size, I intermediate_size, N query heads, K their width (M + P).

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from care_mla.facts import ModelFacts
from care_mla.heal.lora import adapter_parameters
from care_mla.heal.loss import rows_of_chunk
from care_mla.heal.sizes import Sizes
from care_mla.heal.student import is_trained, shape_of_student
from care_mla.heal_config import HealConfig
from care_mla.plan import BASE_BYTES, parameter_count


class Parameters(NamedTuple):
    """Numbers of weights; `key_width` is that of the student's queries and keys, K."""

    student: int
    trained: int
    teacher: int
    key_width: int


def count_parameters(
    facts: ModelFacts, student: PreTrainedConfig, teacher: ModelFacts, config: HealConfig
) -> Parameters:
    """Count the weights of both models, from configurations alone.

    Args:
        facts: the original's; `student` is the configuration of its converted model in our own class.
    """
    shapes = {name: p.numel() for name, p in shape_of_student(facts, student).named_parameters()}
    if config.train == "lora":
        trained = adapter_parameters(shape_of_student(facts, student), config.lora_rank)
    else:
        trained = sum(count for name, count in shapes.items() if is_trained(name, config.train))
    width = student.qk_nope_head_dim + student.qk_rope_head_dim
    return Parameters(sum(shapes.values()), trained, parameter_count(teacher), width)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of one process, by part, and of the disk; `machine` is what it needs beside a GPU's memory."""

    parameters: int
    trained: int
    memory: dict[str, int]
    machine: dict[str, int]
    disk: dict[str, int]

    @property
    def memory_bytes(self) -> int:
        """The sum of the parts."""
        return sum(self.memory.values())

    @property
    def disk_bytes(self) -> int:
        """Work folder and output together."""
        return sum(self.disk.values())

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "memory_bytes": self.memory_bytes, "disk_bytes": self.disk_bytes}


def memory_plan(
    facts: ModelFacts,
    config: HealConfig,
    sizes: Sizes,
    parameters: Parameters,
    *,
    on_gpu: bool,
    shards: int = 1,
    itemsize: int = 2,
) -> MemoryPlan:
    """What a process holds.

    Args:
        facts: the original's.
        shards: processes that share the weights.
        itemsize: bytes of a weight in the folder written.
    """
    width = 2 if on_gpu else 4
    trained = parameters.trained
    ends = facts.vocab_size * facts.hidden_size * (1 if facts.tie_word_embeddings else 2)
    gathered = 0
    if shards > 1:
        # The student is float32, and no weight is held for both models.
        held = 4 * (parameters.student + ends) + width * (parameters.teacher - ends)
        held += 4 * trained if config.train == "lora" else 0
        # Embeddings and heads stay gathered for a pass, with their gradients; layers come two at a time.
        layer = (parameters.student - ends) // facts.num_hidden_layers
        gathered = 2 * width * (ends + layer) + (4 * ends if config.train == "all" else 0)
    else:
        # What is frozen in the student is the teacher's, and is held once; what trains is cast on a GPU.
        held = (4 + (2 if on_gpu else 0)) * trained + width * parameters.teacher
    tokens = sizes.micro_batch * sizes.sequence_length
    in_layer = 8 * facts.hidden_size + 4 * facts.intermediate_size
    in_layer += 5 * facts.num_attention_heads * parameters.key_width
    layers = facts.num_hidden_layers
    activations = (
        in_layer + layers * facts.hidden_size if config.gradient_checkpointing else layers * in_layer
    )
    # Terms on hidden states or attention's outputs hold those of all layers, of both models.
    activations += (
        2
        * layers
        * facts.hidden_size
        * sum(weight > 0 for weight in (config.hidden_states, config.attention_outputs))
    )
    rows = rows_of_chunk(tokens, facts.vocab_size, "cuda" if on_gpu else "cpu")
    memory = {
        "weights of both models": held // shards,
        "weights gathered for a pass": gathered,
        "gradients": 4 * trained // shards,
        "AdamW's moments": 8 * trained // shards,
        "activations": width * tokens * activations,
        "logits of a chunk": 12 * 4 * rows * facts.vocab_size,
        "copy for a checkpoint": 0 if on_gpu else 12 * trained,
        "Python and torch": BASE_BYTES,
    }
    machine = {
        "both models, while they are read": 4 * parameters.student + width * parameters.teacher,
        "copy for a checkpoint, of the first process": 12 * trained,
    }
    # The two newest, the best of each, and one that is being written.
    disk = {
        "checkpoints": 5 * 12 * trained,
        "tokens": 8 * sizes.tokens * len(config.sources()),
        "output": itemsize * parameters.student,
    }
    return MemoryPlan(
        parameters=parameters.student,
        trained=trained,
        memory=memory,
        machine=machine if on_gpu else {},
        disk=disk,
    )


def plan_rows(plan: MemoryPlan, config: HealConfig, sizes: Sizes, processes: int) -> list[list[object]]:
    """The table that is shown before training."""
    steps, per_step = sizes.steps, sizes.tokens_per_step
    return [
        ["trained", f"{plan.trained:,} of {plan.parameters:,} ({config.train})"],
        ["steps", f"{steps:,}" if steps else f"as many as {config.minutes:g} minutes allow"],
        ["tokens per step", f"{per_step:,} ({sizes.batch_size} x {sizes.sequence_length})"],
        ["tokens in all", f"{steps * per_step:,}" if steps else "-"],
        ["distinct tokens of each text", f"up to {sizes.tokens:,}"],
        ["checkpoint", f"every {sizes.save_every:,} steps"],
        ["processes", processes],
        ["memory of each", _gib(plan.memory_bytes)],
        *[[f"  {part}", _gib(nbytes)] for part, nbytes in plan.memory.items() if nbytes],
        *[[f"  the machine's: {part}", _gib(nbytes)] for part, nbytes in plan.machine.items()],
        ["disk", _gib(plan.disk_bytes)],
        *[[f"  {part}", _gib(nbytes)] for part, nbytes in plan.disk.items()],
    ]


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
