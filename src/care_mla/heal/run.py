"""`heal`: the order of the steps. Checks, tokens, training, then the folder in the profile that it had."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from care_mla import console as terminal
from care_mla.calibrate.sample import load_model
from care_mla.checkpoint.opening import open_source
from care_mla.checkpoint.writer import atomic_folder, check_output, require_disk
from care_mla.configs import VerifyConfig
from care_mla.device import peak_memory
from care_mla.errors import CheckpointError, OptionError
from care_mla.export.card import CARD, Card, write_card
from care_mla.export.profile import TARGETS, Target
from care_mla.export.verify import SOURCE_CONFIG, StoredReference, read_reference, store_reference, verify
from care_mla.heal.checkpoints import Checkpoints, RunState
from care_mla.heal.data import Blocks, Sampling, load_corpora, start_token
from care_mla.heal.engine import Distiller, is_sharded, make_accelerator, place
from care_mla.heal.lora import merged, require_peft
from care_mla.heal.loss import LossWeights
from care_mla.heal.memory import MemoryPlan, Sizes, memory_plan, plan_rows, resolve_sizes
from care_mla.heal.student import HealedFolder, StudentFolder, choose_weights
from care_mla.heal.trainer import train
from care_mla.heal_config import SELF, HealConfig
from care_mla.plan import parameter_count
from care_mla.recipe import recipe_text
from care_mla.versions import versions
from care_mla.workspace import Workspace, read_json, write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

    from care_mla.checkpoint.source import Source

# Options that change no weight of the result, or that follow from others.
NOT_IN_STAMP = (
    *("quiet", "json", "model", "output", "teacher", "data", "tokens", "held_out_tokens", "sequence_length"),
    *("micro_batch_size", "gradient_checkpointing", "compile", "shard", "plan", "dtype", "work", "recipe"),
    *("overwrite", "trust_remote_code", "device"),
)


class Opened(NamedTuple):
    """What a run works on, after all checks that need no weights."""

    folder: StudentFolder
    teacher: Source
    stored: StoredReference
    target: Target
    profile: str
    dtype: torch.dtype


def heal(config: HealConfig) -> dict[str, Any] | None:
    """Train a converted model towards its original and write it; returns the result for JSON.

    Started by `accelerate launch` or `torchrun`, every process returns, and the first alone has a result.

    Raises:
        CareError: whatever stands in the way; before any work where it can be known.
    """
    config.check_paths()
    terminal.silence_transformers()
    opened = open_all(config)
    workspace = Workspace(config.work_folder)
    accelerator = make_accelerator(config, str(workspace.path("trackers")))
    terminal.set_quiet(config.quiet or not accelerator.is_main_process)
    if config.batch_size % accelerator.num_processes:
        raise OptionError(
            f"--batch-size {config.batch_size} cannot be split evenly over {accelerator.num_processes} "
            f"processes. Try --batch-size {accelerator.num_processes * max(1, config.batch_size // 8)}"
        )
    on_gpu = accelerator.device.type == "cuda"
    sizes = resolve_sizes(opened.folder.facts, config, on_gpu=on_gpu, processes=accelerator.num_processes)
    planned = plan_of(opened, config, sizes, accelerator)
    title = f"Healing {config.model} towards {config.teacher}"
    if accelerator.is_main_process and not config.quiet:
        terminal.current().table(
            title, ["", "amount"], plan_rows(planned, config, sizes, accelerator.num_processes)
        )
    if config.plan:
        return planned.as_json() if accelerator.is_main_process else None
    require_disk(
        {
            config.output.absolute().parent: planned.disk["output"],
            workspace.folder.absolute(): planned.disk["checkpoints"] + planned.disk["tokens"],
        }
    )
    blocks = prepare_blocks(opened.teacher, config, workspace, accelerator, sizes)
    with accelerator.main_process_first():
        workspace.claim("heal", _stamp(config, opened, blocks, sizes))
    checkpoints = Checkpoints(workspace)
    state = _train(opened, blocks, config, accelerator, checkpoints, sizes)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return None
    step, kl, cross_entropy = state.best
    _, kl_before, cross_entropy_before = state.held_out[0]
    if step == 0:
        terminal.current().warn(
            "no measurement on the held-out text was better than before training, so the weights are those "
            f"of {config.model}. Train with a lower --learning-rate than {config.learning_rate:g}, or on "
            "more text"
        )
    verdict = write_healed(opened, checkpoints.weights(step), state, blocks, config)
    return {
        "steps": state.steps,
        "held_out": {"before": kl_before, "after": kl},
        "held_out_cross_entropy": {"before": cross_entropy_before, "after": cross_entropy},
        "measurements": [{"step": s, "kl": k, "cross_entropy": c} for s, k, c in state.held_out],
        "best_step": step,
        "train": config.train,
        "trained_parameters": planned.trained,
        "data": [
            {
                "name": c.name,
                "share": c.share,
                "tokens": c.train_BL.numel(),
                "held_out": c.held_out_BL.numel(),
            }
            for c in blocks.corpora
        ],
        "training_seconds": state.elapsed,
        "peak_memory_bytes": peak_memory(accelerator.device),
        "profile": opened.profile,
        "output": str(config.output),
        "verify": verdict,
    }


def open_all(config: HealConfig) -> Opened:
    """Open both models and check, on configurations and headers alone, that they belong together.

    Raises:
        CareError: they do not, or the result could not be written.
    """
    if config.train == "lora":
        require_peft()
    folder = StudentFolder(config.model)
    folder.check()
    stored = read_reference(config.model)
    assert config.teacher is not None
    teacher = open_source(config.teacher, trust_remote_code=config.trust_remote_code)
    teacher.check()
    original = folder.training_facts
    for key in ("architecture", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        ours, theirs = getattr(original, key), getattr(teacher.facts, key)
        if ours != theirs:
            raise OptionError(
                f"--teacher {config.teacher} has {key} {theirs}, and {config.model} was converted from a "
                f"model with {ours}, so it is not the original. Nothing was written. Name the model that it "
                "was converted from."
            )
    profile = "care"
    if not folder.is_own:
        card = folder.folder / CARD
        profile = (
            read_json(card)["profile"] if card.is_file() else folder.config["model_type"].replace("_", "-")
        )
    target = TARGETS[profile]  # type: ignore[index]
    dtype: torch.dtype = getattr(torch, config.dtype or folder.facts.dtype)
    target.check(folder, dtype)
    check_output(config.output, config.overwrite)
    return Opened(folder, teacher, stored, target, profile, dtype)


def plan_of(opened: Opened, config: HealConfig, sizes: Sizes, accelerator: Accelerator) -> MemoryPlan:
    """Sizes of everything, from the headers of the converted folder."""
    folder, facts = opened.folder, opened.folder.training_facts
    shapes = {name: torch.Size(part.shape).numel() for name, part in folder._parts.items()}
    attention = sum(count for name, count in shapes.items() if ".self_attn." in name)
    norms = sum(count for name, count in shapes.items() if "norm." in name and ".self_attn." not in name)
    student = sum(shapes.values())
    widths = folder.student_config()
    key_width = widths.qk_nope_head_dim + widths.qk_rope_head_dim
    adapters = sum(
        config.lora_rank * sum(part.shape)
        for name, part in folder._parts.items()
        if ".self_attn." in name and len(part.shape) == 2
    )
    trained = {
        "attention": attention,
        "attention+norms": attention + norms,
        "all": student,
        "lora": adapters,
    }[config.train]
    return memory_plan(
        facts,
        config,
        sizes,
        student=student,
        trained=trained,
        teacher=parameter_count(opened.teacher.facts),
        key_width=key_width,
        on_gpu=accelerator.device.type == "cuda",
        shards=accelerator.num_processes if is_sharded(config, accelerator) else 1,
        itemsize=opened.dtype.itemsize,
    )


def prepare_blocks(
    teacher: Source, config: HealConfig, workspace: Workspace, accelerator: Accelerator, sizes: Sizes
) -> Blocks:
    """All tokens; what the teacher writes is sampled by all processes together, and kept."""
    sources = config.sources()
    itemsize = 2 if accelerator.device.type == "cuda" else 4
    sampling = Sampling(
        teacher,
        workspace,
        sequences=max(2, sizes.tokens // sizes.sequence_length),
        length=sizes.sequence_length,
        seed=config.seed,
        itemsize=itemsize,
    )
    if any(name == SELF for name, _ in sources) and not sampling.path.exists():
        dtype = torch.bfloat16 if itemsize == 2 else torch.float32
        model = load_model(teacher, device=accelerator.device, dtype=dtype)
        sampling.write_parts(
            model, start_token(teacher), accelerator.process_index, accelerator.num_processes
        )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            sampling.join()
        accelerator.wait_for_everyone()
    corpora = load_corpora(
        teacher,
        sources,
        sampling.blocks,
        tokens=sizes.tokens,
        length=sizes.sequence_length,
        held_out_tokens=sizes.held_out_tokens,
        seed=config.seed,
    )
    return Blocks(corpora, config.seed)


def _stamp(config: HealConfig, opened: Opened, blocks: Blocks, sizes: Sizes) -> dict[str, Any]:
    """Everything that the checkpoints of a run depend on."""
    options = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in NOT_IN_STAMP}
    return {
        "model": opened.folder.fingerprint(),
        "teacher": opened.teacher.fingerprint(),
        "data": blocks.content_hash,
        "sequence_length": sizes.sequence_length,
        **options,
    }


def _train(
    opened: Opened,
    blocks: Blocks,
    config: HealConfig,
    accelerator: Accelerator,
    checkpoints: Checkpoints,
    sizes: Sizes,
) -> RunState:
    terminal.current().step("Loading both models")
    student = opened.folder.load_student()
    if accelerator.is_main_process:
        check_student(student, opened.stored, config.model)
    choose_weights(student, config.train, config.lora_rank, config.seed)
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    on_cpu = torch.device("cpu")
    teacher = load_model(opened.teacher, device=on_cpu, dtype=dtype)
    weights = LossWeights(config.cross_entropy, config.beta, config.temperature)
    distiller = Distiller(student, teacher, weights, config.hidden_states)
    model = place(distiller, accelerator, config)
    accelerator.init_trackers("care-heal")
    return train(model, blocks, config, accelerator, checkpoints, micro_batch=sizes.micro_batch)


def check_student(student: Any, stored: StoredReference, folder: Path) -> None:
    """Check that the student computes what the folder's reference says, before anything is trained.

    Raises:
        CheckpointError: it does not, so the folder's weights are not those of its reference.
    """
    if stored.is_slice:
        return
    with torch.no_grad():
        logits_BLS = student(stored.tokens_BL).logits
    error = ((logits_BLS - stored.reference_BLS).norm() / stored.reference_BLS.norm()).item()
    if not error <= stored.tolerance:
        raise CheckpointError(
            f"{folder}: its weights give logits {error:.2g} away from the stored reference (at most "
            f"{stored.tolerance:g} for {stored.dtype}): they were changed after the conversion. Nothing was "
            f"written. Convert the model again: care convert MODEL {folder} --overwrite"
        )


def write_healed(
    opened: Opened, weights: Mapping[str, Tensor], state: RunState, blocks: Blocks, config: HealConfig
) -> dict[str, Any]:
    """Write the trained model in the profile that it came in, with a new reference, and verify it."""
    console = terminal.current()
    if config.train == "lora":
        weights = merged(_projections(opened.folder), weights)
    source = HealedFolder(config.model, weights)
    layers = lru_cache(maxsize=2)(source.latent_layer)
    stored = opened.stored
    num_layers = len(stored.cached_values) if stored.is_slice else None
    recipe = recipe_text(config)
    with atomic_folder(config.output, config.overwrite) as folder:
        with console.progress(f"Writing {config.output}", source.facts.num_hidden_layers) as progress:
            summary = opened.target.write(source, layers, folder, opened.dtype, progress.advance)
        console.step("Computing the reference in float64")
        store_reference(
            folder,
            source,
            layers,
            stored.tokens_BL,
            num_greedy=len(stored.greedy_T),
            num_layers=num_layers,
            cached_values=summary.get("cached_values"),
            original_BLS=stored.original_BLS,
        )
        # The original's own configuration, which the source of this export only continues.
        shutil.copyfile(config.model / SOURCE_CONFIG, folder / SOURCE_CONFIG)
        write_text(folder / "recipe-heal.yaml", recipe)
        if (config.model / "recipe.yaml").is_file():
            shutil.copyfile(config.model / "recipe.yaml", folder / "recipe.yaml")
        console.step("Verifying in a fresh process without care_mla")
        verdict = verify(VerifyConfig(model=folder, quiet=config.quiet))
        if (config.model / CARD).is_file():
            write_card(folder, _card(opened, state, blocks, config, recipe, verdict))
    for warning in summary.get("warnings", ()):
        console.warn(warning)
    return verdict


def _projections(folder: StudentFolder) -> dict[str, Tensor]:
    """The plain projections of all layers, in the scale in which adapters trained on them."""
    result = {}
    for layer_idx in range(folder.facts.num_hidden_layers):
        for name, tensor in folder.scaled_attention(layer_idx).items():
            result[f"model.layers.{layer_idx}.self_attn.{name}"] = tensor
    return result


def _card(
    opened: Opened,
    state: RunState,
    blocks: Blocks,
    config: HealConfig,
    recipe: str,
    verdict: dict[str, Any],
) -> Card:
    card = Card(**read_json(config.model / CARD))
    step, kl, _ = state.best
    texts = ", ".join(f"{c.name} ({c.train_BL.numel():,} tokens)" for c in blocks.corpora)
    what = {
        "all": "All weights",
        "attention": "Attention's weights",
        "lora": "Attention's weights, by adapters,",
    }
    trained = what.get(config.train, "Attention's weights and all norms")
    others = "" if config.train == "all" else " All other weights are the original's."
    healed = (
        f"{trained} were then trained towards the original for {step} steps of "
        f"{config.batch_size * blocks.held_out_BL.shape[1]:,} tokens on {texts}; KL to it on held-out text "
        f"went from {state.held_out[0][1]:.4g} to {kl:.4g} nats per token.{others}"
    )
    return replace(
        card,
        name=config.output.name,
        healed=healed,
        kl_held_out=kl,
        perplexity=None,
        needs_healing=(),
        verify=verdict,
        recipe=f"{card.recipe.strip()}\n---\n# care heal\n{recipe}",
        versions=versions(),
        fingerprints={**card.fingerprints, "healing tokens": blocks.content_hash},
        warnings=[*card.warnings, *terminal.current().warnings],
    )
