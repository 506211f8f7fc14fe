"""Converted pico models for the tests of export: random decoupled layers that DeepSeek can say."""
# Shapes: B sequences, L positions, D hidden_size, N query heads, G KV heads, H head_dim, R kv_lora_rank,
#         M qk_nope_head_dim, P qk_rope_head_dim, F frequencies (P/2).

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from care_mla.checkpoint.opening import open_source
from care_mla.checkpoint.source import Source
from care_mla.export.deepseek import write_deepseek_checkpoint
from care_mla.export.verify import store_reference
from care_mla.factors import LatentLayer
from care_mla.families import rotary_frequencies

from pico import pico_model


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def token_ids(batch: int = 2, length: int = 24, *, vocab: int = 320, seed: int = 0) -> Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def decoupled_layer(
    source: Source, seed: int, *, rank: int = 20, nope: int = 10, fold: int = 2
) -> LatentLayer:
    """Random factors; every `fold`-th frequency of the source, and biases where the source has them."""
    facts, generator = source.facts, torch.Generator().manual_seed(seed)
    heads, groups, head_dim, hidden = (
        facts.num_attention_heads,
        facts.num_key_value_heads,
        facts.head_dim,
        facts.hidden_size,
    )
    width = facts.rotary_dim // fold

    def draw(*shape: int, fan_in: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64) / fan_in**0.5

    def bias(*shape: int) -> Tensor | None:
        return draw(*shape, fan_in=1, scale=0.3) if facts.q_bias else None

    return LatentLayer(
        form="decoupled",
        down_RD=draw(rank, hidden, fan_in=hidden),
        up_k_GMR=draw(groups, nope, rank, fan_in=rank),
        up_v_GHR=draw(groups, head_dim, rank, fan_in=rank),
        q_rope_NPD=draw(heads, width, hidden, fan_in=hidden, scale=1.5),
        inv_freq_JF=torch.tensor([rotary_frequencies(facts)[::fold]], dtype=torch.float64),
        q_nope_NMD=draw(heads, nope, hidden, fan_in=hidden, scale=1.5),
        k_rope_JPD=draw(1, width, hidden, fan_in=hidden, scale=1.5),
        q_rope_bias_NP=bias(heads, width),
        q_nope_bias_NM=bias(heads, nope),
        k_rope_bias_JP=bias(1, width),
        v_bias_GH=bias(groups, head_dim),
    )


@dataclass(frozen=True)
class Exported:
    """A source, its factors, and the folder written from them, with its reference."""

    source: Source
    layers: list[LatentLayer]
    folder: Path
    summary: dict[str, Any]


def export(
    tmp: Path, dtype: torch.dtype = torch.float32, *, tokens_BL: Tensor | None = None, **options: Any
) -> Exported:
    source = open_source(str(pico_model(tmp / "source", **options)))
    layers = [decoupled_layer(source, seed) for seed in range(source.facts.num_hidden_layers)]
    folder = tmp / "out"
    summary = write_deepseek_checkpoint(source, layers.__getitem__, folder, dtype)
    tokens_BL = token_ids() if tokens_BL is None else tokens_BL
    store_reference(folder, source, layers.__getitem__, tokens_BL, num_greedy=8)
    return Exported(source, layers, folder, summary)
