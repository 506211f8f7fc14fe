"""Model families: what a `config.json` means. Nothing here imports torch or transformers."""

from care_mla.families.base import block_norms, layer_weight_names, weight_names
from care_mla.families.registry import FAMILIES, facts_from_config
from care_mla.families.rope import rotary_frequencies

__all__ = [
    "FAMILIES",
    "block_norms",
    "facts_from_config",
    "layer_weight_names",
    "rotary_frequencies",
    "weight_names",
]
