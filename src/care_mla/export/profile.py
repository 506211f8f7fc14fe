"""Every profile in one table, and which one and which dtype a conversion is written in, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from care_mla import console
from care_mla.configs import METHOD_ALLOCATION, PER_LAYER_ALLOCATIONS, PlanConfig, Profile
from care_mla.export.deepseek import check_deepseek, write_deepseek_checkpoint
from care_mla.export.gguf_model import check_gguf, write_gguf
from care_mla.export.hf import write_latent_checkpoint
from care_mla.export.latent_norm import refuse_float16
from care_mla.export.stock import (
    check_deepseek_v2,
    check_mistral4,
    write_deepseek_v2_checkpoint,
    write_mistral4_checkpoint,
)
from care_mla.export.vllm import write_vllm_checkpoint
from care_mla.export_config import ExportProfile
from care_mla.factors import LatentLayer
from care_mla.facts import ModelFacts
from care_mla.mla.mapping import class_names
from care_mla.profiles import as_converted, stock_profile

if TYPE_CHECKING:
    from care_mla.checkpoint.source import Source
    from care_mla.export.converted import ConvertedFolder


class Writer(Protocol):
    """Writes a model: everything but attention from the source, attention from its factored layers.

    Returns what it decided, for JSON.
    """

    def __call__(
        self,
        source: Source,
        layers: Callable[[int], LatentLayer],
        output: Path,
        dtype: torch.dtype,
        advance: Callable[[], None] = ...,
        /,
    ) -> dict[str, Any]: ...


class Target(NamedTuple):
    """One profile.

    `check` refuses a converted model that the profile cannot express in a dtype, by name and before any work;
    `write` writes it; `engines` load it, as `care verify --engine` names them.
    """

    check: Callable[[ConvertedFolder, torch.dtype], None]
    write: Writer
    engines: tuple[str, ...]


def _check_deepseek(model: ConvertedFolder, dtype: torch.dtype) -> None:
    check_deepseek(model.facts, "decoupled", dtype=dtype)


def _check_vllm(model: ConvertedFolder, dtype: torch.dtype) -> None:
    check_deepseek(model.facts, "decoupled", dtype=dtype, profile="vllm")


def _check_care(model: ConvertedFolder, dtype: torch.dtype) -> None:
    class_names(model.facts)


TARGETS: dict[Profile | ExportProfile, Target] = {
    "deepseek-v3": Target(_check_deepseek, write_deepseek_checkpoint, ("transformers", "vllm")),
    "deepseek-v2": Target(check_deepseek_v2, write_deepseek_v2_checkpoint, ("transformers", "vllm")),
    "mistral4": Target(check_mistral4, write_mistral4_checkpoint, ("transformers",)),
    "vllm": Target(_check_vllm, write_vllm_checkpoint, ("transformers", "vllm")),
    "gguf": Target(check_gguf, write_gguf, ("llama.cpp",)),
    "care": Target(_check_care, write_latent_checkpoint, ("transformers",)),
}


def pick_dtype(facts: ModelFacts, config: PlanConfig) -> torch.dtype:
    """The dtype of the weights written: what was asked for, or the source's.

    float16 cannot hold the small latent of stock classes, so a float16 source is written in bfloat16 unless
    asked otherwise; a warning says so.
    """
    name = config.dtype or facts.dtype
    if name == "float16":
        console.current().warn(
            "the original is float16, which cannot hold a converted model's latent; written in bfloat16, "
            "with 3 bits less of each weight. Keep them with --dtype float32"
        )
        name = "bfloat16"
    if name == "float64":
        console.current().note("The original is float64; written in float32.")
        name = "float32"
    dtype = getattr(torch, name)
    refuse_float16(dtype)
    return dtype


def pick_profile(facts: ModelFacts, config: PlanConfig) -> Profile:
    """The profile asked for, or the stock one if it can express the model.

    Raises:
        ExportError: the profile asked for cannot.
        UnsupportedModelError: none can.
    """
    converted = as_converted(facts, config)
    spread = METHOD_ALLOCATION.get(config.method, config.allocation)
    if config.profile not in (None, "care"):
        check_deepseek(converted, config.form, dtype=torch.float32, profile=config.profile)
        return config.profile
    stock = config.profile is None and config.form == "decoupled" and spread not in PER_LAYER_ALLOCATIONS
    if stock:
        profile, reason = stock_profile(converted)
        if profile is None:
            console.current().warn(
                f"written for our own class (profile care), not for stock engines: {reason}"
            )
        else:
            if reason:
                console.current().note(f"Written in the profile {profile}, not deepseek-v3: {reason}.")
            return profile
    class_names(facts)
    return "care"


def write_checkpoint(
    profile: Profile,
    source: Source,
    layers: Callable[[int], LatentLayer],
    folder: Path,
    dtype: torch.dtype,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Write the converted model; returns what the exporter decided."""
    return TARGETS[profile].write(source, layers, folder, dtype, advance)
