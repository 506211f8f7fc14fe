"""The healed folder: trained weights in the profile that they came in, a reference, curves, and a card."""
# Shapes: B sequences, L positions, S vocabulary.

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from care_mla import console as terminal
from care_mla.checkpoint.writer import atomic_folder
from care_mla.configs import VerifyConfig
from care_mla.export.card import CARD, Card, write_card
from care_mla.export.verify import SOURCE_CONFIG, store_reference, verify
from care_mla.heal.curves import FIGURE, write_curves
from care_mla.heal.data import Blocks
from care_mla.heal.lora import merged
from care_mla.heal.opening import Opened
from care_mla.heal.student import HealedFolder, StudentFolder
from care_mla.heal_config import HealConfig
from care_mla.recipe import recipe_text
from care_mla.versions import versions
from care_mla.workspace import read_json, write_text

WHAT = {
    "attention": "Attention's weights",
    "attention+norms": "Attention's weights and all norms",
    "all": "All weights",
    "lora": "Attention's weights, by adapters,",
}


def write_healed(
    opened: Opened,
    weights: Mapping[str, Tensor],
    history: Mapping[str, Any],
    blocks: Blocks,
    config: HealConfig,
    device: torch.device,
) -> dict[str, Any]:
    """Write the trained model, verify it in a fresh process, and return what that found.

    Args:
        weights: what trained, by its names in the student.
        history: of the training, as `curves.py` draws it.
        device: where the reference is computed.
    """
    console = terminal.current()
    if config.train == "lora":
        weights = merged(projections(opened.folder), weights)
    source = HealedFolder(config.model, weights)
    layers = lru_cache(maxsize=2)(source.latent_layer)
    stored = opened.stored
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
            num_layers=len(stored.cached_values) if stored.is_slice else None,
            device=device,
            cached_values=summary.get("cached_values"),
            original_BLS=stored.original_BLS,
        )
        # The original's own configuration, which the source of this export only continues.
        shutil.copyfile(config.model / SOURCE_CONFIG, folder / SOURCE_CONFIG)
        write_curves(history, folder / CARD.parent)
        recipe = recipe_text(config)
        write_text(folder / "recipe-heal.yaml", recipe)
        if (config.model / "recipe.yaml").is_file():
            shutil.copyfile(config.model / "recipe.yaml", folder / "recipe.yaml")
        for warning in summary.get("warnings", ()):
            console.warn(warning)
        console.step("Verifying in a fresh process without care_mla")
        verdict = verify(VerifyConfig(model=folder, quiet=config.quiet))
        if (config.model / CARD).is_file():
            write_card(folder, _card(opened, history, blocks, config, recipe, verdict))
    return verdict


def projections(folder: StudentFolder) -> dict[str, Tensor]:
    """The plain projections of all layers, in the scale in which adapters trained on them."""
    return {
        f"model.layers.{layer_idx}.self_attn.{name}": tensor
        for layer_idx in range(folder.facts.num_hidden_layers)
        for name, tensor in folder.scaled_attention(layer_idx).items()
    }


def _card(
    opened: Opened,
    history: Mapping[str, Any],
    blocks: Blocks,
    config: HealConfig,
    recipe: str,
    verdict: dict[str, Any],
) -> Card:
    card = Card(**read_json(config.model / CARD))
    texts = ", ".join(f"{c.name} ({len(c.train_I) * blocks.length:,} tokens)" for c in blocks.corpora)
    before, after = (history["held_out"][key] for key in ("before", "after"))
    healed = (
        f"{WHAT[config.train]} were then trained towards the original for {history['best_step']} steps of "
        f"{history['tokens_per_step']:,} tokens on {texts}; KL to it on held-out text went from "
        f"{before:.4g} to {after:.4g} nats per token."
    )
    others = "" if config.train == "all" else " All other weights are the original's."
    curves = f"\n\n![KL to the original over training]({CARD.parent / FIGURE})"
    return replace(
        card,
        name=config.output.name,
        healed=healed + others + curves,
        kl_held_out=after,
        perplexity=None,
        needs_healing=(),
        verify=verdict,
        recipe=f"{card.recipe.strip()}\n---\n# care heal\n{recipe}",
        versions=versions(),
        fingerprints={**card.fingerprints, "healing tokens": blocks.content_hash},
        warnings=[*card.warnings, *terminal.current().warnings],
    )
