"""Model families: what a `config.json` means. Nothing here imports torch or transformers."""

from care_mla.families.base import Family, block_norms, layer_weight_names, weight_names
from care_mla.families.registry import FAMILIES, facts_from_config, family_of
from care_mla.families.rope import rotary_frequencies

__all__ = [
    "FAMILIES",
    "Family",
    "block_norms",
    "facts_from_config",
    "family_of",
    "layer_weight_names",
    "rotary_frequencies",
    "weight_names",
]
