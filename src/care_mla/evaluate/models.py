"""Any model that `evaluate` may be given: a source, or a folder that `convert` or `export` wrote.

Opening reads configuration and tokenizer, so that everything can be checked before any weights are read;
weights are loaded one model at a time.
"""
# Shapes: B sequences, L positions, D hidden_size.

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from care_mla.calibrate.sample import load_model
from care_mla.checkpoint.folder import read_tokenizer
from care_mla.checkpoint.opening import model_path, open_source
from care_mla.checkpoint.safetensors_header import read_header
from care_mla.checkpoint.source import Source
from care_mla.errors import CheckpointError
from care_mla.export.engine_transformers import loader
from care_mla.export.hf import holds_our_code
from care_mla.export.verify import OWN_MODEL_TYPE

CONVERTED_TYPES = ("deepseek_v3", "deepseek_v2", "mistral4", OWN_MODEL_TYPE)


@dataclass(frozen=True)
class OpenedModel:
    """A model whose configuration and tokenizer have been read.

    Attributes:
        max_length: tokens of its context, `max_position_embeddings`.
        load: reads the weights, in float32.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    load: Callable[[], PreTrainedModel]


def open_model(name: str, *, device: torch.device, trust_remote_code: bool) -> OpenedModel:
    """Open a model by what the user typed.

    Our own classes (profile care) lie in the folder as remote code; they are what this package wrote there,
    so they need no flag.

    Raises:
        CareError: there is no such model, it cannot be run, or it has no tokenizer.
    """
    folder = model_path(name)
    model_type = _model_type(folder)
    if not model_type.startswith(CONVERTED_TYPES):
        source = open_source(name, trust_remote_code=trust_remote_code)
        source.check()
        length = source.facts.max_position_embeddings
        return OpenedModel(name, source.tokenizer(), length, partial(_load_source, source, device))
    trusted = trust_remote_code
    if model_type.startswith(OWN_MODEL_TYPE) and not trusted:
        if not holds_our_code(folder):
            raise CheckpointError(
                f"{name}: its modeling.py is not the one of this version of care, so it is not run unasked. "
                "If you know where it comes from: --trust-remote-code"
            )
        trusted = True
    for path in sorted(folder.glob("*.safetensors")):
        read_header(path)  # a file that is cut off is found before another model was measured for an hour
    tokenizer = read_tokenizer(name, folder, trust_remote_code=trusted)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    load = partial(_load_converted, name, folder, config, device, trusted)
    return OpenedModel(name, tokenizer, config.max_position_embeddings, load)


def final_states(model: PreTrainedModel, tokens_BL: Tensor) -> Tensor:
    """What the head reads: hidden states after the last norm, (B, L, D)."""
    tokens_BL = tokens_BL.to(next(model.parameters()).device)
    return model.base_model(tokens_BL, use_cache=False).last_hidden_state


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The layer from `final_states` to logits."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear), type(head)
    return head


def _load_source(source: Source, device: torch.device) -> PreTrainedModel:
    return load_model(source, device=device)


def _load_converted(
    name: str, folder: Path, config: PreTrainedConfig, device: torch.device, trusted: bool
) -> PreTrainedModel:
    try:
        with warnings.catch_warnings():
            # Of the shared expert that Mistral 4's class insists on, 0 wide.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            model, info = loader(config).from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=trusted, output_loading_info=True
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
    return model.to(device).eval().requires_grad_(False)


def _model_type(folder: Path) -> str:
    """What a folder's configuration calls itself; empty where there is none to be read."""
    config = folder / "config.json"
    if not config.is_file():
        return ""
    try:
        return str(json.loads(config.read_text(encoding="utf-8")).get("model_type", ""))
    except ValueError as error:
        raise CheckpointError(f"{config} is not JSON ({error}). Replace it by the original.") from error
