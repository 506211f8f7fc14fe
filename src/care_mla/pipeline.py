"""`convert`: the order of the steps, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from care_mla import console as terminal
from care_mla.calibrate.data import TokenBlocks
from care_mla.calibrate.layers import LayerStack
from care_mla.calibrate.run import calibrate, check_calibration, matching_text, whole_model_fits
from care_mla.checkpoint.finite import require_finite
from care_mla.checkpoint.opening import DEMO, open_source
from care_mla.checkpoint.source import Source
from care_mla.checkpoint.writer import atomic_folder, check_output, require_disk
from care_mla.configs import ConvertConfig, Profile, VerifyConfig
from care_mla.decompose.absorb import constant_error
from care_mla.decompose.layer_inputs import CalibratedLayers
from care_mla.decompose.methods import decoupled_variants, method_function, variants
from care_mla.device import peak_memory, pick_device
from care_mla.errors import OptionError
from care_mla.export.card import NEEDS_HEALING, Card, healing_warning, write_card
from care_mla.export.profile import pick_dtype, pick_profile, write_checkpoint
from care_mla.export.verify import store_reference, verify
from care_mla.factors import LatentLayer
from care_mla.families.rope_table import has_choice
from care_mla.forms import check_form
from care_mla.mla.choose import Choice, candidates, choose
from care_mla.mla.divergence import measure
from care_mla.mla.match import Matching, match_layers
from care_mla.plan import plan
from care_mla.recipe import recipe_text
from care_mla.serving import fit_vllm
from care_mla.versions import versions
from care_mla.workspace import Workspace, fingerprint, layer_file, read_json, write_json, write_text

# What `verify` compares: few tokens, since their logits over the whole vocabulary are stored with the model.
VERIFY_BLOCKS, VERIFY_LENGTH = 2, 48
SLICE_LAYERS = 2


def convert(config: ConvertConfig) -> dict[str, Any]:
    """Convert a model as the options say, check what was written, and return the result for JSON.

    Raises:
        CareError: whatever stands in the way; before any work where it can be known.
    """
    config.check_paths()
    stages = Stages()
    console = terminal.current()
    terminal.silence_transformers()
    with stages("check"):
        source = open_source(config.model, trust_remote_code=config.trust_remote_code)
        check_form(source.facts, config.form)
        device = pick_device(config.device)
        config, size_warnings = fit_vllm(source.facts, config)
        wanted = variants(source.facts, config, form=config.form, method=config.method)
        profile = pick_profile(source.facts, config)
        if profile == "vllm" and config.rope_table == "auto" and has_choice(source.facts):
            # vLLM's own class reads no other table.
            config = replace(config, rope_table="plain")
        wanted = decoupled_variants(
            wanted, source.facts, config, for_engines=profile in ("deepseek-v3", "deepseek-v2")
        )
        dtype = pick_dtype(source.facts, config)
        planned = plan(source.facts, config, device=device.type)
        workspace = Workspace(config.work or config.output.with_name(config.output.name + ".work"))
        _check_places(config, workspace.folder, planned.disk)
        check_calibration(source, config, device)
        source.check()
        require_finite(source, workspace)
    # What the device or the model decided is written down, so that the recipe does the same elsewhere.
    recipe = recipe_text(
        replace(
            config,
            calibration_tokens=planned.calibration_tokens,
            sequence_length=planned.sequence_length,
            dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
            profile=profile,
        )
    )
    for warning in (*planned.warnings, *size_warnings):
        console.warn(warning)
    stack = LayerStack(source, device=device)
    with stages("calibrate"):
        blocks = calibrate(stack, config, workspace, console)
    inputs = CalibratedLayers(source, workspace, stack.inv_freq_F, damping=config.damping, device=device)
    with stages("choose"):
        open_choices = candidates(wanted, config.allocation, inputs, per_layer=profile == "care")
        title = f"Choosing between {len(open_choices)} candidates on held-out text"
        with console.progress(title, stack.num_layers + 1) as progress:
            (choice,) = choose(
                stack,
                inputs,
                [open_choices],
                blocks.held_out_BL,
                workspace,
                progress.advance,
                measure_all=bool(planned.needs_healing),
            )
    with stages("factor"), console.progress(f"Factoring: {choice.label}", stack.num_layers) as progress:
        layers, layer_rows = _factor(choice, inputs, workspace, progress.advance)
    matched = None
    if config.match_steps:
        with stages("match"):
            layers, matched = _match(stack, config, layers, choice, blocks, workspace, profile)
        for row, errors in zip(layer_rows, matched.errors, strict=True):
            row["match"] = errors
    held_out_kl = min(matched.held_out_kl.values()) if matched else choice.held_out_kl
    if needs_healing := [*planned.needs_healing, *absorbed(choice, layer_rows)]:
        console.warn(healing_warning(needs_healing, held_out_kl))
    with atomic_folder(config.output, config.overwrite) as folder:
        with stages("export"):
            with console.progress(f"Writing {config.output}", stack.num_layers) as progress:
                exported = write_checkpoint(profile, source, layers, folder, dtype, progress.advance)
            console.step("Computing the reference in float64")
            tokens_BL = blocks.held_out_BL[:VERIFY_BLOCKS, :VERIFY_LENGTH]
            num_layers = None if whole_model_fits(source, device) else min(SLICE_LAYERS, stack.num_layers)
            # The export may widen the cache for its kernels' sake.
            cached = exported.get("cached_values")
            store_reference(
                folder, source, layers, tokens_BL, device=device, num_layers=num_layers, cached_values=cached
            )
            write_text(folder / "recipe.yaml", recipe)
        with stages("verify"):
            console.step("Verifying in a fresh process without care_mla")
            verdict = verify(VerifyConfig(model=folder, quiet=config.quiet))
        hashes = {"source weights": source.fingerprint(), "calibration tokens": blocks.content_hash}
        result = {
            "model": config.model,
            "cached_values": {
                "original": source.facts.cached_values,
                "converted": cached or _mean_cached(layer_rows),
            },
            "kv_lora_rank": choice.kv_lora_rank,
            "qk_rope_head_dim": exported.get("qk_rope_head_dim", choice.variant.qk_rope_head_dim),
            "freqfold": choice.variant.freqfold,
            "form": config.form,
            "method": config.method,
            "allocation": choice.allocation,
            "profile": profile,
            "held_out_kl": held_out_kl,
            "candidates": [
                {"candidate": label, "kl": kl, "chosen": label == choice.label}
                for label, kl in (choice.candidates_kl or {}).items()
            ],
            "rope": {
                "type": source.facts.rope_type,
                "table": choice.variant.rope_table,
                "kl": choice.table_kl,
            },
            "biases": {"option": config.biases, "kl": choice.bias_kl},
            "engines": exported.get("engines", {"transformers": True}),
            "needs_healing": needs_healing,
            "output": str(config.output),
            "stages": stages.seconds,
            "peak_memory_bytes": peak_memory(device),
            "export": exported,
            "layers": layer_rows,
            "verify": verdict,
            "recipe": recipe,
            "fingerprints": hashes,
        }
        if matched is not None:
            result["match"] = {
                "steps": config.match_steps,
                "tokens": matched.tokens,
                "heads_apart": matched.heads_apart,
                "held_out_kl": matched.held_out_kl,
                "kept": matched.is_kept,
            }
        write_card(folder, _card(config, source, result, recipe, hashes))
    return result


def absorbed(choice: Choice, rows: list[dict[str, Any]]) -> list[str]:
    """Why absorbed biases make the result no more than a start for healing; empty: there are none."""
    reasons = []
    if choice.variant.absorbs_biases:
        worst = max(row["constant_error"] for row in rows)
        reasons.append(
            "biases of attention are absorbed into weights by least squares, which makes up for them up to a "
            f"mean squared error of {worst:.2g} of their square in the worst layer"
        )
    return reasons


def _mean_cached(rows: list[dict[str, Any]]) -> int | float:
    mean = sum(row["cached_values"] for row in rows) / len(rows)
    return int(mean) if mean.is_integer() else mean


def _card(
    config: ConvertConfig,
    source: Source,
    result: dict[str, Any],
    recipe: str,
    fingerprints: dict[str, str],
) -> Card:
    return Card(
        name=config.output.name,
        original=source.name,
        profile=result["profile"],
        form=config.form,
        method=config.method,
        kv_lora_rank=result["kv_lora_rank"],
        qk_rope_head_dim=result["qk_rope_head_dim"],
        cached_values=(result["cached_values"]["original"], result["cached_values"]["converted"]),
        kl_held_out=result["held_out_kl"],
        rope_kl=result["rope"]["kl"],
        bias_kl=result["biases"]["kl"],
        engines=result["engines"],
        needs_healing=result["needs_healing"],
        verify=result["verify"],
        matched=_matched_text(result["match"]) if "match" in result else "",
        recipe=recipe,
        versions=versions(),
        fingerprints=fingerprints,
        warnings=[text for text in terminal.current().warnings if not text.startswith(NEEDS_HEALING)],
    )


def _matched_text(match: dict[str, Any]) -> str:
    kl = match["held_out_kl"]
    kept = "" if match["kept"] else ", and was not kept"
    return (
        f"Block matching trained each layer's attention by itself, {match['steps']} steps on "
        f"{match['tokens']:,} tokens, which took the divergence on held-out text from {kl['before']:.4f} to "
        f"{kl['after']:.4f}{kept}."
    )


def _check_places(config: ConvertConfig, work: Path, disk: dict[str, int]) -> None:
    """Where the original, the output and the work folder lie: apart, and with room on their disks."""
    output, original = config.output.resolve(), Path(config.model).expanduser().resolve()
    if config.model != DEMO and original.exists() and output in (original, *original.parents):
        raise OptionError(
            f"{config.output} holds the original, {config.model}, which --overwrite would delete. Nothing "
            f"was changed. Name another folder: care convert {config.model} {config.output}-mla"
        )
    for taken in (output, original):
        if taken in (work.resolve(), *work.resolve().parents):
            raise OptionError(
                f"--work {work} lies in {taken}, which holds a model and nothing else. Nothing was written. "
                f"Name another folder: --work {taken}.work"
            )
    check_output(config.output, config.overwrite)
    work_bytes = sum(nbytes for part, nbytes in disk.items() if part != "output")
    require_disk({config.output.absolute().parent: disk["output"], work.absolute(): work_bytes})


def _factor(
    choice: Choice, inputs: CalibratedLayers, workspace: Workspace, advance: Callable[[], None]
) -> tuple[Callable[[int], LatentLayer], list[dict[str, Any]]]:
    """Factor every layer, once; returns how to read the factors back, and the rows about them."""
    folder = f"layers_{fingerprint([choice.label, choice.ranks, inputs.damping])}"
    factor = method_function(choice.variant)
    rows = []
    for layer_idx, ranks in enumerate(choice.ranks):
        row_path = workspace.path(folder, f"{layer_file(layer_idx)}.json")
        if not row_path.exists():
            layer_inputs = inputs[layer_idx]
            decomposition = factor(layer_inputs)
            latent = decomposition.cut(ranks)
            # Rounded here, once, so that reference and export are the same model.
            latent.to("cpu", torch.float32).save(workspace.path(folder, layer_file(layer_idx)))
            spectra = [spectrum.cpu() for spectrum in decomposition.spectra]
            lost = sum(float(s[rank:].sum()) for s, rank in zip(spectra, ranks, strict=True))
            row = {
                "rank": sum(ranks),
                "cached_values": latent.cached_values,
                "ranks": list(ranks),
                "predicted_error": lost / sum(float(s.sum()) for s in spectra),
                "spectrum": [s.tolist() for s in spectra] if len(spectra) > 1 else spectra[0].tolist(),
                "gamma": layer_inputs.gamma_NF.abs().mean(0).tolist(),
            }
            if decomposition.rope_kept_N is not None:
                row["rope_kept"] = [round(share, 4) for share in decomposition.rope_kept_N.tolist()]
            if choice.variant.absorbs_biases:
                row["constant_error"] = constant_error(layer_inputs)
            write_json(row_path, row)
        rows.append(read_json(row_path))
        advance()
    return lambda layer_idx: LatentLayer.load(workspace.path(folder, layer_file(layer_idx))), rows


def _match(
    stack: LayerStack,
    config: ConvertConfig,
    layers: Callable[[int], LatentLayer],
    choice: Choice,
    blocks: TokenBlocks,
    workspace: Workspace,
    profile: Profile,
) -> tuple[Callable[[int], LatentLayer], Matched]:
    """Train every layer towards the original's stream; what diverges less on held-out text is kept."""
    console = terminal.current()
    tokens_BL = matching_text(stack, config, blocks, workspace, console)
    # Stock classes expand the latent for every query head; our own rebuilds keys and values per KV head.
    matching = Matching(steps=config.match_steps, seed=config.seed, heads_apart=profile != "care")
    depends_on = [
        *(choice.label, choice.ranks, config.damping, stack.source.fingerprint(), blocks.content_hash)
    ]
    title = f"Matching the original's stream, {config.match_steps} steps a layer"
    with console.progress(title, stack.num_layers) as progress:
        trained, errors = match_layers(
            stack,
            layers,
            tokens_BL,
            workspace,
            matching,
            depends_on=depends_on,
            advance=lambda row: progress.advance(
                text=f"error {row['error_before']:.2g} to {row['error_after']:.2g}"
            ),
        )
    with console.progress("Measuring on held-out text", stack.num_layers + 1) as progress:
        both = {"before": layers, "after": trained}
        _, measured = measure(stack, both, blocks.held_out_BL[:1], progress.advance)
    kl = {name: found.mean_kl for name, found in measured.items()}
    is_kept = kl["after"] < kl["before"]
    if not is_kept:
        console.warn(
            f"block matching did not lower the divergence on held-out text (KL {kl['before']:.4f} before, "
            f"{kl['after']:.4f} after), so the layers stay as they were factored. Give it more text: "
            "--match-tokens N"
        )
    matched = Matched(
        tokens=tokens_BL.numel(),
        heads_apart=matching.heads_apart,
        errors=errors,
        held_out_kl=kl,
        is_kept=is_kept,
    )
    return trained if is_kept else layers, matched


class Matched(NamedTuple):
    """What block matching did: the errors of every layer, and KL to the original before and after."""

    tokens: int
    heads_apart: bool
    errors: list[dict[str, float]]
    held_out_kl: dict[str, float]
    is_kept: bool


class Stages:
    """Seconds of each stage, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
