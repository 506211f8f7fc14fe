"""`care heal`, step by step: checks, tokens, training, then the folder in the profile that it had."""

from __future__ import annotations

from dataclasses import fields
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from care_mla import console as terminal
from care_mla.calibrate.sample import load_model
from care_mla.checkpoint.writer import require_disk
from care_mla.device import peak_memory
from care_mla.heal.checkpoints import Checkpoints, RunState
from care_mla.heal.curves import write_curves
from care_mla.heal.data import Blocks
from care_mla.heal.engine import Distiller, is_sharded, make_accelerator, place
from care_mla.heal.loss import LossWeights
from care_mla.heal.memory import MemoryPlan, count_parameters, memory_plan, plan_rows
from care_mla.heal.opening import Opened, check_student, open_all
from care_mla.heal.sizes import Sizes, resolve_sizes, settled
from care_mla.heal.speed import flops_per_token, peak_flops
from care_mla.heal.student import choose_weights
from care_mla.heal.texts import load_corpora
from care_mla.heal.trainer import train
from care_mla.heal.writing import write_healed
from care_mla.heal_config import HealConfig
from care_mla.workspace import Workspace

if TYPE_CHECKING:
    from accelerate import Accelerator

# Options that change no weight of the result, or that follow from others.
NOT_IN_STAMP = (
    *("quiet", "json", "model", "output", "teacher", "data", "tokens", "held_out_tokens"),
    *("micro_batch_size", "gradient_checkpointing", "compile", "shard", "plan", "dtype", "work", "recipe"),
    *("overwrite", "trust_remote_code", "device"),
)


def heal_model(config: HealConfig) -> dict[str, Any] | None:
    """Train a converted model towards its original and write it; returns the result for JSON.

    Started by `accelerate launch` or `torchrun`, every process returns, and the first alone has a result.

    Raises:
        CareError: whatever stands in the way; before any work where it can be known.
    """
    config.check_paths()
    terminal.silence_transformers()
    opened = open_all(config)
    workspace = Workspace(config.work_folder)
    accelerator = make_accelerator(config, workspace.path("trackers"))
    terminal.set_quiet(config.quiet or not accelerator.is_main_process)
    sizes, planned = _plan(opened, config, accelerator)
    config = settled(config, sizes)
    if config.plan:
        return planned.as_json() if accelerator.is_main_process else None
    # What an interrupted run has written already needs no room again.
    written = sum(path.stat().st_size for path in workspace.folder.rglob("*") if path.is_file())
    require_disk(
        {
            config.output.absolute().parent: planned.disk["output"],
            workspace.folder.absolute(): planned.disk_bytes - planned.disk["output"] - written,
        }
    )
    blocks = Blocks(load_corpora(opened.teacher, config, workspace, accelerator, sizes), config.seed)
    with accelerator.main_process_first():
        workspace.claim("heal", _stamp(config, opened, blocks))
    checkpoints = Checkpoints(workspace)
    state, speed = _train(opened, blocks, config, accelerator, checkpoints, sizes)
    if not accelerator.is_main_process:
        return None
    (step, kl, cross_entropy), weights = checkpoints.best(state)
    _, kl_before, cross_entropy_before = state.held_out[0]
    if step == 0:
        terminal.current().warn(
            "no measurement on the held-out text was better than before training, so the weights are those "
            f"of {config.model}. Train with a lower --learning-rate than {config.learning_rate:g}, or on "
            "more text"
        )
    history = {
        "tokens_per_step": sizes.tokens_per_step,
        "best_step": step,
        "held_out": {"before": kl_before, "after": kl},
        "held_out_cross_entropy": {"before": cross_entropy_before, "after": cross_entropy},
        "measurements": [{"step": s, "kl": k, "cross_entropy": c} for s, k, c in state.held_out],
        "losses": [{key: row[key] for key in ("step", "loss", "kl")} for row in state.steps],
    }
    write_curves(history, workspace.folder)
    verdict = write_healed(opened, weights, history, blocks, config, accelerator.device)
    del history["losses"]  # `steps` has them, with their speed
    return {
        "steps": state.steps,
        **history,
        "train": config.train,
        "trained_parameters": planned.trained,
        "data": [corpus.as_json() for corpus in blocks.corpora],
        "training_seconds": state.elapsed,
        **speed,
        "peak_memory_bytes": peak_memory(accelerator.device),
        "profile": opened.profile,
        "output": str(config.output),
        "verify": verdict,
    }


def _plan(opened: Opened, config: HealConfig, accelerator: Accelerator) -> tuple[Sizes, MemoryPlan]:
    """Settle lengths and numbers, and show what they take."""
    processes, on_gpu = accelerator.num_processes, accelerator.device.type == "cuda"
    facts = opened.folder.training_facts
    sizes = resolve_sizes(facts, config, on_gpu=on_gpu, processes=processes)
    planned = memory_plan(
        facts,
        config,
        sizes,
        count_parameters(facts, opened.folder.student_config(), opened.teacher.facts, config),
        on_gpu=on_gpu,
        shards=processes if is_sharded(config, accelerator) else 1,
        itemsize=opened.dtype.itemsize,
    )
    if accelerator.is_main_process and not config.quiet:
        title = f"Healing {config.model} towards {config.teacher}"
        terminal.current().table(title, ["", "amount"], plan_rows(planned, config, sizes, processes))
    return sizes, planned


def _stamp(config: HealConfig, opened: Opened, blocks: Blocks) -> dict[str, Any]:
    """Everything that the checkpoints of a run depend on."""
    options = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in NOT_IN_STAMP}
    return {
        "model": opened.folder.fingerprint(),
        "teacher": opened.teacher.fingerprint(),
        "data": blocks.content_hash,
        **options,
    }


def _train(
    opened: Opened,
    blocks: Blocks,
    config: HealConfig,
    accelerator: Accelerator,
    checkpoints: Checkpoints,
    sizes: Sizes,
) -> tuple[RunState, dict[str, Any]]:
    """Load both models and train; returns how it went, and how fast, for JSON."""
    terminal.current().step("Loading both models")
    student = opened.folder.load_student()
    if accelerator.is_main_process:
        check_student(student, opened.stored, config.model)
    choose_weights(student, config.train, config.lora_rank, config.seed)
    facts, widths = opened.folder.training_facts, student.config
    key_width = widths.qk_nope_head_dim + widths.qk_rope_head_dim
    flops = flops_per_token(student, facts, sizes.sequence_length, key_width=key_width)
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    teacher = load_model(opened.teacher, device=torch.device("cpu"), dtype=dtype)
    weights = LossWeights(config.cross_entropy, config.beta, config.temperature)
    distiller = Distiller(student, teacher, weights, config.hidden_states, config.attention_outputs)
    model = place(distiller, accelerator, config)
    accelerator.init_trackers("care-heal")
    state = train(model, blocks, config, accelerator, checkpoints, sizes)
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    peak = peak_flops(name)
    rate = median(row["tokens_per_second"] for row in state.steps)
    processes = accelerator.num_processes
    speed = {
        "device": name,
        "processes": processes,
        "tokens_per_second": rate,
        "flops_per_token": flops,
        "model_flop_utilisation": None if peak is None else rate * flops / (peak * processes),
    }
    accelerator.end_training()
    return state, speed
