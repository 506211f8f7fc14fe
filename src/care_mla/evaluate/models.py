"""Loading any model that `evaluate` may be given: a source, or a folder that `convert` wrote."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from care_mla.calibrate.sample import cache_argument, load_model
from care_mla.checkpoint.opening import open_source
from care_mla.errors import CheckpointError
from care_mla.export.engine_transformers import loader
from care_mla.export.hf import holds_our_code
from care_mla.export.verify import OWN_MODEL_TYPE

CONVERTED_TYPES = ("deepseek_v3", "deepseek_v2", "mistral4", OWN_MODEL_TYPE)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be measured, in float32."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(name: str, *, device: torch.device, trust_remote_code: bool) -> LoadedModel:
    """Load a model by what the user typed.

    Our own classes (profile care) lie in the folder as remote code; they are what this package wrote there,
    so they need no flag.
    """
    folder = Path(name)
    model_type = _model_type(folder)
    if not model_type.startswith(CONVERTED_TYPES):
        source = open_source(name, trust_remote_code=trust_remote_code)
        source.check()
        return LoadedModel(name, load_model(source, device=device), source.tokenizer())
    trusted = trust_remote_code
    if model_type.startswith(OWN_MODEL_TYPE) and not trusted:
        if not holds_our_code(folder):
            raise CheckpointError(
                f"{name}: its modeling.py is not the one of this version of care, so it is not run unasked. "
                "If you know where it comes from: --trust-remote-code"
            )
        trusted = True
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trusted)
        with warnings.catch_warnings():
            # Of the shared expert that Mistral 4's class insists on, 0 wide.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            model, info = loader(config).from_pretrained(
                name, dtype=torch.float32, trust_remote_code=trusted, output_loading_info=True
            )
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{name}: its weights cannot be read ({error}). Convert it again.") from error
    # transformers would fill what is missing with random numbers, and say so only in a log.
    lost = sorted(
        str(key) for kind in ("missing_keys", "mismatched_keys", "unexpected_keys") for key in info[kind]
    )
    if lost:
        raise CheckpointError(
            f"{name}: {', '.join(lost[:3])}: weights that are missing, or that the class does not know. Its "
            "files are damaged. Convert it again."
        )
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trusted)
    model = model.to(device).eval()
    model.requires_grad_(False)
    assert tokenizer is not None, name
    return LoadedModel(name, model, tokenizer)


def _model_type(folder: Path) -> str:
    """What a folder's configuration calls itself; empty where there is none to be read."""
    config = folder / "config.json"
    if not config.is_file():
        return ""
    try:
        return str(json.loads(config.read_text(encoding="utf-8")).get("model_type", ""))
    except ValueError as error:
        raise CheckpointError(f"{config} is not JSON ({error}). Replace it by the original.") from error


@torch.no_grad()
def live_cache(model: PreTrainedModel, tokens_1L: Tensor) -> tuple[float, int]:
    """Values per token per layer and bytes per token in all layers, counted from the live cache.

    Bytes are at the width of the loaded weights.
    """
    cache = DynamicCache(config=model.config)
    model(tokens_1L, use_cache=True, **{cache_argument(model): cache})
    held = [
        t for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor) and t.ndim == 4
    ]
    length = tokens_1L.shape[1]
    values = sum(t.numel() for t in held) / length / len(cache.layers)
    return values, sum(t.numel() * t.element_size() for t in held) // length
