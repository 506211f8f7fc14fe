"""Does an engine compute what the factors say? The reference stored with a model, and the comparison.

Writes `care_reference/reference.safetensors` into the output folder: token ids, the logits of the reference
forward and of the original, and a greedy continuation. `verify` reads it, and what an engine gives in a
process of its own. The subfolder keeps it from engines that load every safetensors file beside `config.json`.
"""
# Shapes: B sequences, L positions, S vocabulary, T greedy steps.

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from care_mla.configs import VerifyConfig
from care_mla.errors import CheckpointError, OptionError
from care_mla.export.engine_transformers import METADATA_KEY, OWN_MODEL_TYPE, REFERENCE
from care_mla.export.hf import holds_our_code
from care_mla.export.vllm_process import run_vllm
from care_mla.factors import LatentLayer
from care_mla.mla.reference import Reference
from care_mla.workspace import save_tensors, write_json

if TYPE_CHECKING:
    from care_mla.checkpoint.source import Source

# The original's completed configuration: what `care export` must know of the original and cannot see.
SOURCE_CONFIG = REFERENCE.with_name("source_config.json")
ENGINE_SCRIPT = Path(__file__).with_name("engine_transformers.py")
# Largest relative error of logits. Float32 gives about 2e-6; a wrong eps, RoPE layout or scale 0.2 and more.
# The rounding of weights to bfloat16 is a part of the file, and moves logits by half to three per cent.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
# Of 48 tokens in float16, one took another expert; each such token's logits are off by about a third.
WITHOUT_FLIPS = 0.9


@dataclass(frozen=True, kw_only=True)
class StoredReference:
    """What `store_reference` wrote. `cached_values` has an entry for each layer."""

    tokens_BL: Tensor
    reference_BLS: Tensor
    original_BLS: Tensor
    greedy_T: Tensor
    greedy_logits_TS: Tensor
    form: str
    dtype: str
    tolerance: float
    cached_values: list[int]
    is_slice: bool = False
    has_experts: bool = False
    runs_code: bool = False


def store_reference(
    folder: Path,
    source: Source,
    layers: Callable[[int], LatentLayer],
    tokens_BL: Tensor,
    *,
    num_greedy: int = 64,
    num_layers: int | None = None,
    device: torch.device | str = "cpu",
    cached_values: int | None = None,
    original_BLS: Tensor | None = None,
) -> None:
    """Compute the reference in float64 and store it with a converted model.

    Args:
        folder: with the `config.json` of the export; it may be unfinished.
        layers: gives the factored layer of a 0-based index.
        tokens_BL: token ids; the greedy continuation goes on from the first row.
        num_greedy: tokens of that continuation.
        num_layers: only so many of the first layers, for models too large to run whole; `verify` then cuts
            the engine's model too.
        device: where the reference runs.
        cached_values: of every layer as exported; None: those of the factors.
        original_BLS: logits of the original, where `source` is not the original itself.
    """
    facts = source.facts
    kept = facts.num_hidden_layers if num_layers is None else num_layers
    reference = Reference(source, layers, device, num_layers=kept)
    greedy = reference.greedy(tokens_BL[0], num_greedy)
    if original_BLS is None:
        original_BLS = Reference(source, None, device, num_layers=kept).logits(tokens_BL).float()
    tensors = {
        "tokens_BL": tokens_BL,
        "reference_BLS": reference.logits(tokens_BL).float(),
        "original_BLS": original_BLS,
        "greedy_T": greedy.tokens_T,
        "greedy_logits_TS": greedy.logits_TS.float(),
    }
    dtype = json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"]
    metadata = {
        "form": layers(0).form,
        "dtype": dtype,
        "tolerance": TOLERANCES[dtype],
        "cached_values": [cached_values or layers(layer_idx).cached_values for layer_idx in range(kept)],
        "num_layers": kept,
        "is_slice": kept < facts.num_hidden_layers,
        "has_experts": any(layer_idx < kept for layer_idx in facts.sparse_layers),
    }
    save_tensors(folder / REFERENCE, tensors, metadata={METADATA_KEY: json.dumps(metadata)})
    write_json(folder / SOURCE_CONFIG, facts.config)


def copy_reference(converted: Path, folder: Path, dtype: str, *, cached_values: int | None = None) -> None:
    """Put the reference of a converted folder beside its export in another dtype.

    The tolerance is that of the coarser one, since what was rounded once stays so.

    Args:
        dtype: of the export's weights.
        cached_values: of every layer as exported, where the export widened the cache.
    """
    with safe_open(converted / REFERENCE, "pt") as file:
        stored = json.loads(file.metadata()[METADATA_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tolerance = max(stored["tolerance"], TOLERANCES[dtype])
    coarser = dtype if tolerance == TOLERANCES[dtype] else stored["dtype"]
    metadata = stored | {"dtype": coarser, "tolerance": tolerance}
    if cached_values is not None:
        metadata["cached_values"] = [cached_values] * len(stored["cached_values"])
    save_tensors(folder / REFERENCE, tensors, metadata={METADATA_KEY: json.dumps(metadata)})
    shutil.copyfile(converted / SOURCE_CONFIG, folder / SOURCE_CONFIG)


def read_reference(folder: Path) -> StoredReference:
    """What `store_reference` wrote.

    Raises:
        CheckpointError: the folder is no converted model, or holds no reference.
    """
    again = f"Convert it again: care convert MODEL {folder} --overwrite"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no config.json, so it is no model. Name a folder that care convert wrote, or "
            f"make one: care convert MODEL {folder}"
        )
    stored = load_reference(folder / REFERENCE, again)
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", "")
    return replace(stored, runs_code=model_type.startswith(OWN_MODEL_TYPE))


def load_reference(path: Path, again: str) -> StoredReference:
    """The content of a reference file.

    Args:
        again: the sentence that tells how to make it anew.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing, so there is nothing to compare with: care stores it with every model. "
            f"{again}"
        )
    try:
        with safe_open(path, "pt") as file:
            stored = json.loads(file.metadata()[METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): it is cut off or corrupt. {again}"
        ) from error
    names = ("form", "dtype", "tolerance", "cached_values", "is_slice")
    # Folders of older versions do not say whether they have experts.
    experts = {"has_experts": stored.get("has_experts", False)}
    return StoredReference(**tensors, **{name: stored[name] for name in names}, **experts)


def verify(config: VerifyConfig) -> dict[str, Any]:
    """Load a converted model in a fresh process without care_mla, and compare it with the reference.

    Weights are loaded in float32, so what differs is the export itself: its layout, scales and rounding.

    Returns:
        See `judge`.

    Raises:
        CareError: the folder or the engine cannot be used; the message says what to type.
    """
    if config.engine == "llama.cpp":
        from care_mla.export.llama_cpp import verify_gguf

        return verify_gguf(config.model)
    if config.model.is_file():
        raise OptionError(
            f"{config.model} is a file for llama.cpp. Try: care verify {config.model} --engine llama.cpp"
        )
    stored = read_reference(config.model)
    if config.engine == "vllm":
        tensors, metadata = run_vllm(config.model, stored)
        if metadata["dtype"] != "float32":  # a GPU's kernels round, whatever the file holds
            stored = replace(stored, dtype="bfloat16", tolerance=TOLERANCES["bfloat16"])
        return {"engine": config.engine, **judge(stored, tensors, metadata)}
    if stored.runs_code and not holds_our_code(config.model):
        raise CheckpointError(
            f"{config.model}: its modeling.py is not the one of this version of care, so it is not run "
            f"unasked. Convert it again: care convert MODEL {config.model} --overwrite"
        )
    tensors, metadata = _fresh_process(config.model)
    return {"engine": config.engine, **judge(stored, tensors, metadata)}


def _fresh_process(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "result.safetensors"
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            # A model's code is copied here before it runs; an older copy must not take its place.
            "HF_MODULES_CACHE": temporary,
            "TRANSFORMERS_VERBOSITY": "error",
        }
        done = subprocess.run(
            [sys.executable, "-P", str(ENGINE_SCRIPT), str(folder.absolute()), str(result)],
            env=environment, cwd=temporary, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise CheckpointError(
                f"{folder}: transformers cannot load or run it ({lines[-1]}). Its files are damaged or were "
                "changed, or this machine has too little memory. Convert it again: care convert MODEL "
                f"{folder} --overwrite"
            )
        return read_result(result)


def read_result(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What an engine's process wrote."""
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()[METADATA_KEY])
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def judge(stored: StoredReference, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> dict[str, Any]:
    """Compare what an engine gave with the reference.

    Passed are relative errors of the logits within the stored tolerance (1e-4 for float32 weights, 5e-2 for
    bfloat16, whose rounding is a part of the file), a cache of the stored size, the stored weights and no
    others, and the same greedy text. In anything but float32 the texts may part where the reference's own
    margin between the two tokens is smaller than twice the largest error of a logit: rounding alone explains
    that. Rounding also sends a few tokens of a mixture of experts to other experts, where two are equally
    good: in anything but float32, the tenth of its tokens with the largest errors does not count.

    Args:
        tensors: `logits_BLS` and `greedy_T` of the engine.
        metadata: `class`, `cached_values` of each layer and `problems` with weights.

    Returns:
        `relative_error` (of the tokens that count), `max_abs_logprob_difference`, `greedy_equal`,
        `cached_values` (mean over layers),
        `kl_to_original` (mean KL(original || engine), nats per token), `passed`, the engine's `class`, and
        `problems`, why it did not pass.
    """
    logits_BLS, reference_BLS = tensors["logits_BLS"], stored.reference_BLS
    problems = list(metadata["problems"])
    difference_BLS = logits_BLS - reference_BLS
    is_rounded = stored.dtype not in ("float32", "f32")
    share = WITHOUT_FLIPS if is_rounded and stored.has_experts else 1.0
    relative_error = _relative_error(difference_BLS, reference_BLS, share)
    if not relative_error <= stored.tolerance:
        problems.append(
            f"relative error {relative_error:.2g} is above {stored.tolerance:g} for {stored.dtype}"
        )
    if metadata["cached_values"] != stored.cached_values:
        problems.append(f"cached values {metadata['cached_values']}, expected {stored.cached_values}")
    greedy_equal = torch.equal(tensors["greedy_T"], stored.greedy_T)
    excused = is_rounded and _parts_within(stored, tensors["greedy_T"], difference_BLS)
    if not greedy_equal and not excused:
        problems.append("the greedy continuation is another one")
    largest, kl = 0.0, 0.0
    for engine_LS, reference_LS, original_LS in zip(
        logits_BLS, reference_BLS, stored.original_BLS, strict=True
    ):
        log_engine_LS = engine_LS.double().log_softmax(-1)
        log_original_LS = original_LS.double().log_softmax(-1)
        gap_LS = (log_engine_LS - reference_LS.double().log_softmax(-1)).abs()
        largest = max(largest, gap_LS.max().item())
        kl += (log_original_LS.exp() * (log_original_LS - log_engine_LS)).sum().item()
    cached = sum(metadata["cached_values"]) / max(1, len(metadata["cached_values"]))
    return {
        "class": metadata["class"],
        "relative_error": relative_error,
        "max_abs_logprob_difference": largest,
        "greedy_equal": greedy_equal,
        "cached_values": int(cached) if cached.is_integer() else cached,
        # The first layers alone are no language model, so their divergence would mean nothing.
        "kl_to_original": None if stored.is_slice else kl / stored.tokens_BL.numel(),
        "layers_compared": len(stored.cached_values),
        "passed": not problems,
        "problems": problems,
    }


def _relative_error(difference_BLS: Tensor, reference_BLS: Tensor, share: float) -> float:
    """Of the logits of all tokens, or of the `share` of them whose own relative errors are smallest."""
    errors_T = difference_BLS.norm(dim=-1).flatten()
    norms_T = reference_BLS.norm(dim=-1).flatten()
    kept = (errors_T / norms_T).argsort()[: math.ceil(share * len(errors_T))]
    return (errors_T[kept].norm() / norms_T[kept].norm()).item()


def _parts_within(stored: StoredReference, greedy_T: Tensor, difference_BLS: Tensor) -> bool:
    """Whether rounding explains where two continuations part, if they do."""
    parting = (greedy_T != stored.greedy_T).nonzero()
    if len(parting) == 0:
        return True
    step = int(parting[0])
    logits_S = stored.greedy_logits_TS[step]
    margin = logits_S[stored.greedy_T[step]] - logits_S[greedy_T[step]]
    return bool(margin <= 2 * difference_BLS.abs().max())
