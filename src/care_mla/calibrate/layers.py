"""The source model's own stock layers, one in memory at a time.

Reads weights by name from a `Source`; the layer classes are transformers' own, so whatever a family does
between its projections is done here exactly as in the original.
"""
# Shapes: B sequences, L positions, D hidden_size, S vocabulary, H rotary width.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig

from care_mla.calibrate.attention import OBSERVED, observed_attention
from care_mla.checkpoint.spelling import module_tensors

if TYPE_CHECKING:
    from care_mla.checkpoint.source import Source

AttentionInterface.register(OBSERVED, observed_attention)


class LayerStack:
    """The skeleton of the source model on the meta device, filled layer by layer.

    Args:
        source: where weights come from.
        device: where a layer lives while it is used.
        dtype: arithmetic of the layers; statistics need float32.
    """

    def __init__(self, source: Source, *, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.source = source
        self.device = device
        self.dtype = dtype
        self.config = source_config(source)
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(self.config, dtype=dtype).eval()
        # Rotary buffers are computed, not stored, so they must be born on the real device.
        self._rotary = type(self._model.model.rotary_emb)(config=self.config).to(device)
        # longrope changes its buffer when it sees a longer text.
        self._inv_freq_F = self._rotary.inv_freq.clone()

    @property
    def inv_freq_F(self) -> Tensor:
        """RoPE's angle per position of each pair of a head, in `pair_order`: 0 for those that it passes."""
        passed = self.source.facts.head_dim // 2 - len(self._inv_freq_F)
        return torch.nn.functional.pad(self._inv_freq_F, (0, passed))

    @property
    def rope_scale(self) -> float:
        """What RoPE multiplies queries and keys by: 1 but for yarn and longrope."""
        return self._rotary.attention_scaling

    @property
    def num_layers(self) -> int:
        return len(self._model.model.layers)

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """Embedding rows of the given token ids, (B, L, D)."""
        weight_SD = self.source.tensor("model.embed_tokens.weight")
        return weight_SD[tokens_BL].to(self.device, self.dtype)

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 … length-1, each (1, L, H), as the stock layers take them."""
        positions_1L = torch.arange(length, device=self.device)[None]
        like_1D = torch.zeros(1, device=self.device, dtype=self.dtype)
        cos_1LH, sin_1LH = self._rotary(like_1D, positions_1L)
        return cos_1LH, sin_1LH

    @contextmanager
    def layer(self, layer_idx: int, *, attention: str = "sdpa") -> Iterator[nn.Module]:
        """One decoder layer with its weights; they are freed on leaving."""
        self.config._attn_implementation = attention
        layer = self._model.model.layers[layer_idx]
        weights = {
            name: tensor.to(self.device, self.dtype) for name, tensor in self.source.layer(layer_idx).items()
        }
        layer.load_state_dict(module_tensors(self.source.facts, layer_idx, weights), assign=True)
        layer.requires_grad_(False)
        try:
            yield layer
        finally:
            layer.to("meta")

    def run(self, layer: nn.Module, x_BLD: Tensor) -> Tensor:
        """Apply a layer to packed sequences at positions 0 … L-1, causally."""
        output = layer(
            x_BLD,
            attention_mask=self._mask(x_BLD.shape[1]),
            position_ids=torch.arange(x_BLD.shape[1], device=x_BLD.device)[None],
            position_embeddings=self.rotary(x_BLD.shape[1]),
        )
        return output if isinstance(output, Tensor) else output[0]

    def _mask(self, length: int) -> Tensor | None:
        """What the model's own forward gives its layers: nothing but for a sliding window, (1, 1, L, L)."""
        window = self.source.facts.sliding_window
        # Observed attention knows the window itself, and makes no L x L matrix of it.
        if window is None or window >= length or self.config._attn_implementation == OBSERVED:
            return None
        position_L = torch.arange(length, device=self.device)
        behind_LL = position_L[:, None] - position_L
        return ((behind_LL >= 0) & (behind_LL < window))[None, None]

    @contextmanager
    def head(self) -> Iterator[nn.Sequential]:
        """Final norm and output projection: (B, L, D) hidden states to (B, L, S) logits."""
        norm = self._model.model.norm
        norm.load_state_dict({"weight": self._resident("model.norm.weight")}, assign=True)
        tied = self.source.facts.tie_word_embeddings
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        projection = nn.Linear(1, 1, bias=False, device="meta")
        projection.weight = nn.Parameter(self._resident(name), requires_grad=False)
        norm.requires_grad_(False)
        try:
            yield nn.Sequential(norm, projection)
        finally:
            norm.to("meta")

    def _resident(self, name: str) -> Tensor:
        return self.source.tensor(name).to(self.device, self.dtype)


def source_config(source: Source) -> PretrainedConfig:
    """The source model's configuration as transformers has it."""
    config = dict(source.facts.config)
    return AutoConfig.for_model(config.pop("model_type"), **config)
