"""What a conversion will need and give: ranks, memory, disk, tokens, time, cached values. Arithmetic alone.

Reads a model's facts and the options; writes nothing. Every figure is a formula in this file: memory of the
step that needs most, disk at its fullest, and a time below which no run can come.
"""
# Shapes: D hidden_size, I intermediate_size, S vocabulary, N query heads, G KV heads, H head_dim, L sequence
# length,
#         R kv_lora_rank, P qk_rope_head_dim, M qk_nope_head_dim.

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from care_mla.budget import Dims, cached_values, resolve_dims
from care_mla.configs import CalibrationConfig, Form, PlanConfig
from care_mla.errors import OptionError
from care_mla.facts import ModelFacts
from care_mla.families.effects import check_effects
from care_mla.families.rope_scaling import switches_table
from care_mla.forms import check_form, needs_healing
from care_mla.matching_plan import MatchingCost, matching_cost, matching_tokens
from care_mla.profiles import as_converted, check_profile

GIB = 2**30
ATTENTION_ROWS = 128  # query positions whose attention to all keys is held at once
MICRO_BATCH_TOKENS = 2048  # swept at once, in whole sequences; one longer sequence goes alone
# Python with torch and transformers loaded, before any model: 0.5 GiB measured, with room for the allocator.
BASE_BYTES = GIB
SAMPLING_CACHE_BYTES = 2**31  # keys and values while the model writes its own text; more goes in batches
REFERENCE_BYTES = 2**32  # the reference forward keeps its weights between steps only up to here
# Without a measurement: a laptop's float32 matrix products, and those of a data-centre GPU (TF32).
ASSUMED_FLOPS = {"cpu": 5e10, "cuda": 1e14}
DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def resolve_calibration(facts: ModelFacts, config: CalibrationConfig, *, device: str) -> tuple[int, int]:
    """(tokens, sequence length) of the calibration: the options, or their defaults for the device.

    Raises:
        OptionError: a sequence is longer than the model's positions, or longer than all tokens.
    """
    is_gpu = not device.startswith("cpu")
    length = config.sequence_length
    if length is None:
        length = min(2048 if is_gpu else 256, facts.max_position_embeddings)
    if length > facts.max_position_embeddings:
        raise OptionError(
            f"--sequence-length {length} is longer than the model's {facts.max_position_embeddings} "
            "positions "
            f"(max_position_embeddings). Try --sequence-length {facts.max_position_embeddings}"
        )
    tokens = config.calibration_tokens or (65_536 if is_gpu else 8_192)
    if tokens < length:
        if config.sequence_length is None:
            length = max(tokens, 2)
        else:
            raise OptionError(
                f"--sequence-length {length} is longer than all calibration tokens ({tokens}). "
                f"Try --calibration-tokens {length} or more."
            )
    return tokens, length


def rotation_length(facts: ModelFacts, memory_bytes: int | None) -> int:
    """Length of the sequences for gamma: min(4096, max_position_embeddings), halved until it fits.

    The hidden states of one sequence, its queries, keys, values and MLP activations may take a quarter of the
    memory.
    """
    length = min(4096, facts.max_position_embeddings)
    while memory_bytes is not None and length > 256 and 4 * _activation_bytes(facts, length) > memory_bytes:
        length //= 2
    return length


class Spool(NamedTuple):
    """How the tokens are swept: bytes of layer inputs on disk, sequences in a chunk, and chunks."""

    nbytes: int
    chunk_sequences: int
    chunks: int


def spool(facts: ModelFacts, *, tokens: int, sequence_length: int, max_spool_gib: float) -> Spool:
    """Chunks whose inputs of every layer and of the head, in float32, stay within the spool budget.

    Raises:
        OptionError: not even one sequence fits.
    """
    per_sequence = (facts.num_hidden_layers + 1) * sequence_length * facts.hidden_size * 4
    fits = int(max_spool_gib * GIB) // per_sequence
    if fits == 0:
        raise OptionError(
            f"--max-spool-gib {max_spool_gib} does not hold the layer inputs of one sequence of "
            f"{sequence_length} "
            f"tokens. Try --max-spool-gib {-(-per_sequence * 100 // GIB) / 100}, or a shorter "
            "--sequence-length."
        )
    sequences = -(-tokens // sequence_length)
    chunk = min(fits, sequences)
    return Spool(chunk * per_sequence, chunk, -(-sequences // chunk))


def machine_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's limit if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return total if text == "max" else min(total, int(text))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a conversion needs and gives. Bytes, seconds and values per token; `memory` and `disk` by part."""

    form: Form
    method: str
    candidates: list[Dims]
    cached_values: dict[str, int]
    cache_bytes_per_token: dict[str, int]
    parameters: dict[str, int]
    calibration_tokens: int
    sequence_length: int
    rotation_length: int
    chunks: int
    memory: dict[str, int]
    disk: dict[str, int]
    flops: float
    flops_per_second: float
    warnings: list[str]
    needs_healing: list[str]

    @property
    def memory_bytes(self) -> int:
        """Peak memory: the sum of its parts."""
        return sum(self.memory.values())

    @property
    def disk_bytes(self) -> int:
        """Work folder and output together, at their fullest."""
        return sum(self.disk.values())

    @property
    def seconds(self) -> float:
        """Time floor: all floating-point operations at the rate, nothing else."""
        return self.flops / self.flops_per_second

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON holds it."""
        totals = {
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "time_floor": self.seconds,
        }
        return {**asdict(self), "candidates": [c._asdict() for c in self.candidates], **totals}


def plan(
    facts: ModelFacts,
    config: PlanConfig,
    *,
    device: str = "cpu",
    memory_bytes: int | None = None,
    flops_per_second: float | None = None,
) -> Plan:
    """Plan a conversion.

    Args:
        device: where layers run, `cpu` or a GPU's name.
        memory_bytes: memory to stay within, which limits `rotation_length`; None for no limit.
        flops_per_second: of large float32 matrix products; None takes ASSUMED_FLOPS.

    Raises:
        OptionError: the options fit no rank of this model, or have no effect on it.
        ExportError: the profile cannot express the model.
        UnsupportedModelError: the form cannot.
    """
    check_form(facts, config.form)
    if config.profile is not None:
        check_profile(as_converted(facts, config), config.profile)
    check_effects(facts, config)
    candidates = resolve_dims(facts, config, form=config.form, method=config.method)
    tokens, length = resolve_calibration(facts, config, device=device)
    gamma_length = rotation_length(facts, memory_bytes)
    spooled = spool(facts, tokens=tokens, sequence_length=length, max_spool_gib=config.max_spool_gib)
    converted = max(cached_values(facts, config.form, dims) for dims in candidates)
    out_dims = candidates[0]
    dtype = config.dtype or facts.dtype
    original_parameters = parameter_count(facts)
    converted_parameters = parameter_count(facts, config.form, out_dims)
    # The profile vllm writes a tied head as a tensor of its own.
    writes_head = config.profile == "vllm" and facts.tie_word_embeddings
    head = facts.vocab_size * facts.hidden_size if writes_head else 0
    kind = "cpu" if device.startswith("cpu") else "cuda"
    matching = _matching(facts, config, out_dims, tokens) if config.match_steps else None
    return Plan(
        form=config.form,
        method=config.method,
        candidates=candidates,
        cached_values={"original": facts.cached_values, "converted": converted},
        cache_bytes_per_token={
            "original": 2 * facts.num_hidden_layers * facts.cached_values,
            "converted": 2 * facts.num_hidden_layers * converted,
        },
        parameters={"original": original_parameters, "converted": converted_parameters},
        calibration_tokens=tokens,
        sequence_length=length,
        rotation_length=gamma_length,
        chunks=spooled.chunks,
        memory={
            **_memory(facts, spooled.nbytes // (facts.num_hidden_layers + 1), length, gamma_length),
            "whole model, to write and to verify": _whole_model_bytes(
                facts, max(tokens, matching_tokens(config, tokens)), is_self=config.calibration == "self"
            ),
            **({"block matching": matching.memory} if matching else {}),
        },
        disk={
            "layer inputs": spooled.nbytes,
            "statistics": facts.num_hidden_layers * _statistics_bytes(facts),
            "factors": facts.num_hidden_layers * 4 * _attention_parameters(facts, config.form, out_dims),
            **({"matched layers": matching.layers, "streams to match": matching.streams} if matching else {}),
            "output": (converted_parameters + head) * DTYPE_BYTES[dtype],
        },
        flops=_flops(facts, tokens, length, gamma_length, is_self=config.calibration == "self")
        + (matching.flops if matching else 0.0),
        flops_per_second=flops_per_second or ASSUMED_FLOPS[kind],
        warnings=_warnings(facts, tokens, gamma_length),
        needs_healing=needs_healing(facts, config.form),
    )


def parameter_count(facts: ModelFacts, form: Form | None = None, dims: Dims | None = None) -> int:
    """Weights of the source model, or of the converted one if form and widths are given; without biases."""
    embeddings = facts.vocab_size * facts.hidden_size * (1 if facts.tie_word_embeddings else 2)
    norms = (2 * facts.num_hidden_layers + 1) * facts.hidden_size
    mlps = sum(_mlp_parameters(facts, layer_idx) for layer_idx in range(facts.num_hidden_layers))
    return embeddings + norms + facts.num_hidden_layers * _attention_parameters(facts, form, dims) + mlps


def _matching(facts: ModelFacts, config: PlanConfig, dims: Dims, tokens: int) -> MatchingCost:
    layers = range(facts.num_hidden_layers)
    return matching_cost(
        facts,
        config,
        tokens=matching_tokens(config, tokens),
        original=_attention_parameters(facts),
        converted=_attention_parameters(facts, config.form, dims),
        mlp=max(_mlp_parameters(facts, layer_idx, only_used=True) for layer_idx in layers),
    )


def _mlp_parameters(facts: ModelFacts, layer_idx: int, *, only_used: bool = False) -> int:
    """Weights of a layer's MLP, or of its router and all experts (`only_used`: those that a token uses)."""
    if layer_idx not in facts.sparse_layers:
        return 3 * facts.hidden_size * facts.intermediate_size
    experts = facts.num_experts_per_tok if only_used else facts.num_experts
    router = facts.num_experts * facts.hidden_size
    return router + experts * 3 * facts.hidden_size * facts.moe_intermediate_size


def _attention_parameters(facts: ModelFacts, form: Form | None = None, dims: Dims | None = None) -> int:
    width, heads = facts.hidden_size, facts.num_attention_heads
    out = heads * facts.head_dim * width
    # QK-norm's weights stay where its norms do.
    norms = {None: 0, "head": 2, "full": heads + facts.num_key_value_heads}[facts.qk_norm] * facts.head_dim
    if form is None or dims is None:
        return 2 * out + facts.cached_values * width + norms
    rank, rope = dims
    # Decoupled keys keep all H dimensions beside the RoPE key, and stock classes expand the latent for every
    # head.
    nope = {"decoupled": facts.head_dim, "exact-rope": facts.head_dim, "partial-rope": facts.head_dim - rope}[
        form
    ]
    up_heads = heads if form == "decoupled" else facts.num_key_value_heads
    query = heads * (nope + rope) * width
    latent = cached_values(facts, form, dims) * width + up_heads * (nope + facts.head_dim) * rank
    return query + latent + out + (norms if form == "exact-rope" else 0)


def _attention_bytes(facts: ModelFacts, length: int) -> int:
    """Logits, probabilities and their gradient, float32: one block of rows, the heads of one KV head."""
    return 3 * 4 * facts.num_key_value_groups * ATTENTION_ROWS * length


def _activation_bytes(facts: ModelFacts, tokens: int) -> int:
    """What one layer holds for so many tokens at once, float32."""
    layers = range(facts.num_hidden_layers)
    is_dense = any(layer_idx not in facts.sparse_layers for layer_idx in layers)
    inner = max(
        facts.intermediate_size if is_dense else 0, facts.num_experts_per_tok * facts.moe_intermediate_size
    )
    return 4 * 8 * tokens * (facts.hidden_size + inner)


def _statistics_bytes(facts: ModelFacts) -> int:
    """One layer's sums in float64: covariances, means, query energies, gamma, Fisher matrices, QK-norm's."""
    frequencies = facts.num_attention_heads * facts.head_dim // 2
    values = 4 * facts.hidden_size**2 + 2 * facts.hidden_size + 4 * frequencies + 2 * facts.cached_values**2
    if facts.qk_norm == "head":
        values += facts.hidden_size**2 + (facts.hidden_size + 1) * _qk_rows(facts)
    return 8 * values


def _qk_rows(facts: ModelFacts) -> int:
    """Rows of queries and keys together."""
    return (facts.num_attention_heads + facts.num_key_value_heads) * facts.head_dim


def _memory(facts: ModelFacts, layer_inputs_bytes: int, length: int, gamma_length: int) -> dict[str, int]:
    mlps = [_mlp_parameters(facts, layer_idx) for layer_idx in range(facts.num_hidden_layers)]
    layer = _attention_parameters(facts) + max(mlps)
    tables = facts.vocab_size * facts.hidden_size * (1 if facts.tie_word_embeddings else 2)
    widest = max(facts.hidden_size, facts.cached_values)
    batch = max(1, MICRO_BATCH_TOKENS // length)
    batch_tokens = max(batch * length, gamma_length)
    return {
        "one layer's weights and gradients": 2 * 4 * layer,
        "embeddings and head": 4 * tables,
        "layer inputs and their gradients": 2 * layer_inputs_bytes,
        "attention of a block of rows": _attention_bytes(facts, max(length, gamma_length)),
        "activations of a micro-batch": _activation_bytes(facts, batch_tokens),
        "logits of a micro-batch": 2 * 4 * MICRO_BATCH_TOKENS * facts.vocab_size,
        "statistics": _statistics_bytes(facts),
        "eigenvectors": 4 * 8 * widest**2,
        "Python and torch": BASE_BYTES,
    }


def _whole_model_bytes(facts: ModelFacts, tokens: int, *, is_self: bool) -> int:
    """What the steps beyond one layer hold: the reference in float64, or the model writing its own text."""
    parameters = parameter_count(facts)
    reference = min(8 * parameters, REFERENCE_BYTES)
    if not is_self:
        return reference
    # Half as many tokens again are held out.
    cache = 3 * tokens // 2 * facts.num_hidden_layers * facts.cached_values * 4
    return max(reference, 4 * parameters + min(cache, SAMPLING_CACHE_BYTES))


def _flops(facts: ModelFacts, tokens: int, length: int, gamma_length: int, *, is_self: bool) -> float:
    """Operations that no run can avoid; two per multiply-add."""
    layers = facts.num_hidden_layers
    weights = layers * _attention_parameters(facts) + sum(
        _mlp_parameters(facts, layer_idx, only_used=True) for layer_idx in range(layers)
    )
    head = 2.0 * tokens * facts.vocab_size * facts.hidden_size

    def forward(at_length: int) -> float:
        # Queries meet half of the keys on average: two products of N * H * L / 2 multiply-adds per token.
        attention = 2.0 * facts.num_attention_heads * facts.head_dim * at_length
        return tokens * (2.0 * weights + layers * attention)

    # Forward sweep, and recomputation with the gradients of activations in the backward sweep.
    sweeps = 3 * forward(length) + 2 * head + forward(gamma_length)
    sampling = forward(length) + head if is_self else 0.0
    products = facts.hidden_size**2 + 2 * facts.cached_values**2
    if facts.qk_norm == "head":
        products += facts.hidden_size * (facts.hidden_size + _qk_rows(facts))
    sums = 2.0 * tokens * products * facts.num_hidden_layers
    rows = facts.cached_values
    # An eigendecomposition takes about 9 n^3 multiply-adds; the products around it take rows * D * (rows +
    # D).
    eigen = 18.0 * rows**3 + 2.0 * rows * facts.hidden_size * (rows + facts.hidden_size)
    return sweeps + sampling + sums + facts.num_hidden_layers * eigen


def _warnings(facts: ModelFacts, tokens: int, gamma_length: int) -> list[str]:
    warnings = []
    if switches_table(facts.rope_parameters):
        warnings.append(
            f"longrope takes other angles beyond {facts.max_position_embeddings} positions, and a converted "
            "model has one table: the one up to there, which is now its max_position_embeddings. For longer "
            "texts put long_factor in place of short_factor in a copy of config.json, and convert that."
        )
    if tokens < facts.hidden_size:
        warnings.append(
            f"{tokens} calibration tokens are fewer than hidden_size {facts.hidden_size}: the covariance is "
            f"singular, and damping decides in its place. Try --calibration-tokens {4 * facts.hidden_size}"
        )
    if gamma_length < min(2048, facts.max_position_embeddings):
        warnings.append(
            f"memory limits the sequences for RoPE statistics to {gamma_length} tokens; quality beyond that "
            "length "
            "is unknown. Use a machine with more memory for long contexts."
        )
    return warnings
