"""What runs in a process of its own, without care_mla, to see what transformers makes of a converted folder.

Reads the folder and the reference inside; writes one safetensors file: logits, greedy tokens, and in its
metadata what the cache held. Run as a script: python -I engine_transformers.py FOLDER RESULT.
"""
# Shapes: B sequences, L positions, S vocabulary, T greedy steps.

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

# As a script this must run where care_mla is not installed; the caller below makes sure that it does.
if __name__ == "__main__":
    sys.modules["care_mla"] = None  # type: ignore[assignment]

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)

REFERENCE = Path("care_reference") / "reference.safetensors"
METADATA_KEY = "care_reference"
# The only remote code that is run: that of the profile `care`, written by us into the folder.
OWN_MODEL_TYPE = "care_latent_"


@torch.no_grad()
def run(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load a folder as a user would, and run the stored tokens through it in float32.

    Returns:
        `logits_BLS` and `greedy_T`; and the class, what the cache held per token in each layer, and the
        weights that the file and the class do not agree on.
    """
    with safe_open(folder / REFERENCE, "pt") as file:
        stored = json.loads(file.metadata()[METADATA_KEY])
        tokens_BL, steps = file.get_tensor("tokens_BL"), len(file.get_tensor("greedy_T"))
    own = json.loads((folder / "config.json").read_text())["model_type"].startswith(OWN_MODEL_TYPE)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=own)
    _keep_layers(config, stored["num_layers"])
    model, info = loader(config).from_pretrained(
        folder, config=config, dtype=torch.float32, trust_remote_code=own, output_loading_info=True
    )
    model.eval()
    logits_BLS = torch.cat([model(row_1L, use_cache=False).logits for row_1L in tokens_BL.split(1)])
    greedy_T, cache = greedy(model, tokens_BL[:1], steps)
    problems = [
        f"{kind} weight: {name}" for kind in ("missing", "mismatched") for name in info[f"{kind}_keys"]
    ]
    if not stored["is_slice"]:
        problems += [f"unexpected weight: {name}" for name in info["unexpected_keys"]]
    return {"logits_BLS": logits_BLS.float(), "greedy_T": greedy_T}, {
        "class": type(model).__name__,
        "cached_values": [cached_values(layer) for layer in cache.layers],
        "problems": sorted(map(str, problems)),
    }


def loader(config: PreTrainedConfig) -> Any:
    """What loads a model of this configuration: `AutoModelForCausalLM`, or a class that it does not know.

    transformers counts Mistral 4 among the models for images, though its `Mistral4ForCausalLM` has none.
    """
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if named is None or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return named


def greedy(model: PreTrainedModel, prompt_1L: Tensor, steps: int) -> tuple[Tensor, DynamicCache]:
    """Go on from a prompt, one token at a time over the cache; no generation settings take part."""
    # transformers renamed the argument within the versions that we support.
    names = inspect.signature(model.forward).parameters
    argument = "cache" if "cache" in names else "past_key_values"
    cache = DynamicCache(config=model.config)
    tokens, chosen = prompt_1L, []
    for _ in range(steps):
        logits_S = model(tokens, use_cache=True, **{argument: cache}).logits[0, -1]
        chosen.append(logits_S.argmax())
        tokens = chosen[-1].view(1, 1)
    return torch.stack(chosen), cache


def cached_values(layer: Any) -> int:
    """Values per token in one layer of the live cache of a sequence; a window holds its last tokens alone."""
    return (layer.keys.numel() + layer.values.numel()) // layer.keys.shape[-2]


def _keep_layers(config: PreTrainedConfig, num_layers: int) -> None:
    """Cut a configuration to its first layers, where the reference was too large to compute whole."""
    config.num_hidden_layers = num_layers
    for name in ("kv_lora_rank", "layer_types"):
        if isinstance(value := getattr(config, name, None), list):
            setattr(config, name, value[:num_layers])


if __name__ == "__main__":
    tensors, metadata = run(Path(sys.argv[1]))
    save_file(tensors, sys.argv[2], metadata={METADATA_KEY: json.dumps(metadata)})
