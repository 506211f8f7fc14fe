"""`export_model`: a converted folder written again in another profile, and nothing computed anew."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from care_mla import console as terminal
from care_mla.checkpoint.writer import (
    atomic_file,
    atomic_folder,
    check_output,
    check_output_file,
    require_disk,
)
from care_mla.errors import ExportError
from care_mla.export.card import rewrite_card
from care_mla.export.converted import ConvertedFolder
from care_mla.export.gguf_vocabulary import has_tokenizer
from care_mla.export.llama_cpp import quantize, reference_path, require_llama_cpp, write_reference
from care_mla.export.profile import TARGETS, Target
from care_mla.export.verify import copy_reference, read_reference
from care_mla.export.vllm import write_vllm_checkpoint
from care_mla.export_config import ExportConfig, ExportProfile
from care_mla.profiles import STOCK_PROFILES, profile_blocker

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
RECIPE = "recipe.yaml"


def export_model(config: ExportConfig) -> dict[str, Any]:
    """Write a converted model in another profile.

    Returns:
        `profile`, `quantization`, `output`, `bytes`, `check` (the command that verifies it), and what the
        writer decided.

    Raises:
        CareError: the folder cannot be read, or the profile cannot express it; before any work.
    """
    config.check_paths()
    assert config.profile is not None
    if config.profile not in TARGETS:
        raise ExportError(
            f"--profile {config.profile} cannot be written by this version. Nothing was written. Choose one "
            f"of: {', '.join(name for name in TARGETS if name != 'care')}"
        )
    target = TARGETS[config.profile]
    model = ConvertedFolder(config.model)
    model.check()
    read_reference(config.model)
    names = {dtype: name for name, dtype in DTYPES.items()}
    quantization = config.quantization or names[getattr(torch, model.facts.dtype)]
    if config.profile == "gguf":
        return _export_file(config, model, target, quantization)
    return _export_folder(config, model, target, quantization)


def _export_folder(
    config: ExportConfig, model: ConvertedFolder, target: Target, quantization: str
) -> dict[str, Any]:
    dtype = DTYPES[quantization]
    target.check(model, dtype)
    write = target.write
    if config.kv_lora_rank is not None:
        write = partial(write_vllm_checkpoint, kv_lora_rank=config.kv_lora_rank)
    check_output(config.output, config.overwrite)
    size = dtype.itemsize * sum(path.stat().st_size for path in model.files) // model_itemsize(model)
    require_disk({config.output.absolute().parent: size})
    assert config.profile is not None
    with atomic_folder(config.output, config.overwrite) as folder:
        title = f"Writing {config.output}"
        with terminal.current().progress(title, model.facts.num_hidden_layers) as progress:
            summary = write(model, model.latent_layer, folder, dtype, progress.advance)
        cached = summary.get("cached_values")
        copy_reference(config.model, folder, str(dtype).removeprefix("torch."), cached_values=cached)
        rewrite_card(config.model, folder, config.output.name, config.profile, summary)
        if (config.model / RECIPE).is_file():
            shutil.copyfile(config.model / RECIPE, folder / RECIPE)
        written = _nbytes(folder)
    for warning in summary.pop("warnings", ()):
        terminal.current().warn(warning)
    return {
        **summary,
        "profile": config.profile,
        "quantization": quantization,
        "output": str(config.output),
        "bytes": written,
        "check": f"care verify {config.output} --engine {_engine(model, config.profile, target)}",
    }


def _export_file(
    config: ExportConfig, model: ConvertedFolder, target: Target, quantization: str
) -> dict[str, Any]:
    """Write a GGUF file and its reference; quantised types go through an unquantised file beside it."""
    is_quantized = quantization not in DTYPES
    # What is quantised afterwards is as fine as the folder.
    dtype: torch.dtype = getattr(torch, model.facts.dtype) if is_quantized else DTYPES[quantization]
    if is_quantized:
        require_llama_cpp(f"--quantization {quantization}")
    target.check(model, dtype)
    reference = reference_path(config.output)
    for path in (config.output, reference):
        check_output_file(path, config.overwrite)
    size = dtype.itemsize * sum(path.stat().st_size for path in model.files) // model_itemsize(model)
    require_disk({config.output.absolute().parent: size * 2 if is_quantized else size})
    tokenizer = model.tokenizer() if has_tokenizer(model.folder) else None
    with (
        atomic_file(config.output, config.overwrite) as file,
        atomic_file(reference, config.overwrite) as reference_file,
    ):
        unquantized = file.with_name(f"{file.name}.{model.facts.dtype}") if is_quantized else file
        title = f"Writing {config.output}"
        try:
            with terminal.current().progress(title, model.facts.num_hidden_layers) as progress:
                summary = target.write(model, model.latent_layer, unquantized, dtype, progress.advance)
            if is_quantized:
                terminal.current().step(f"Quantising to {quantization}")
                quantize(unquantized, file, quantization)
        finally:
            if is_quantized:
                unquantized.unlink(missing_ok=True)
        write_reference(config.model, reference_file, quantization, tokenizer)
        written = file.stat().st_size
    return {
        **summary,
        "profile": config.profile,
        "quantization": quantization,
        "output": str(config.output),
        "bytes": written,
        "check": f"care verify {config.output} --engine llama.cpp",
    }


def _engine(model: ConvertedFolder, profile: ExportProfile, target: Target) -> str:
    """The first engine that runs this model exactly in the profile."""
    exact = [
        engine
        for engine in target.engines
        if profile in STOCK_PROFILES and profile_blocker(model.facts, profile, engine=engine) is None
    ]
    return (exact or target.engines)[0]


def model_itemsize(model: ConvertedFolder) -> int:
    """Bytes of a stored weight."""
    dtype: torch.dtype = getattr(torch, model.facts.dtype)
    return dtype.itemsize


def _nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
