"""Loading any model that `evaluate` may be given: a source, or a folder that `convert` wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from care_mla.calibrate.sample import cache_argument, load_model
from care_mla.checkpoint.opening import open_source

CONVERTED_TYPES = ("deepseek_v3", "care_latent_")


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
    config = Path(name) / "config.json"
    model_type = json.loads(config.read_text(encoding="utf-8"))["model_type"] if config.is_file() else ""
    if not model_type.startswith(CONVERTED_TYPES):
        source = open_source(name, trust_remote_code=trust_remote_code)
        source.check()
        return LoadedModel(name, load_model(source, device=device), source.tokenizer())
    is_ours = model_type.startswith("care_latent_")
    trusted = trust_remote_code or is_ours
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=trusted)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trusted)
    model = model.to(device).eval()
    model.requires_grad_(False)
    assert tokenizer is not None, name
    return LoadedModel(name, model, tokenizer)


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
