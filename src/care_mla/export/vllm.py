"""The `vllm` profile: the stock checkpoint with zeros up to the sizes that vLLM's GPU kernels take.

Every zero is exact: a latent channel that nothing writes, a key channel that no query asks for, a RoPE pair
that is zero in keys and queries, a value channel that `o_proj` ignores. What vLLM's own class drops or
misreads is refused by name before anything is written; a tied head, which it does not tie, becomes a tensor.
"""
# Shapes: D hidden_size, N query heads, G KV heads, R kv_lora_rank, M qk_nope_head_dim, P qk_rope_head_dim,
#         F frequencies (P/2), J rope-key heads (1), X anything.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from care_mla.errors import ExportError
from care_mla.export.deepseek import write_deepseek_checkpoint
from care_mla.factors import LatentLayer
from care_mla.facts import ModelFacts
from care_mla.serving import HeadDims, kernel_warnings, kernels, padded_head_dims

if TYPE_CHECKING:
    from care_mla.checkpoint.source import Source

PROFILE = "vllm"


def pad_for_vllm(layer: LatentLayer, *, rope_theta: float, kv_lora_rank: int | None = None) -> LatentLayer:
    """The same attention in the head dims that vLLM's kernels take.

    Values become wider than the original's head_dim; `attention_tensors` widens o_proj by zero columns.

    Args:
        layer: decoupled, with the table theta^(-2i/P).
        rope_theta: theta of that table.
        kv_lora_rank: width to pad the latent to, such as 512; None leaves it. The cache pays for it.

    Raises:
        ExportError: vLLM has no head dims that hold these, or `kv_lora_rank` is below the layer's.
    """
    assert layer.form == "decoupled"
    assert layer.k_rope_JPD is not None
    nope, value = layer.up_k_GMR.shape[1], layer.up_v_GHR.shape[1]
    dims = padded_head_dims(nope, layer.qk_rope_head_dim, value)
    rank = kv_lora_rank or layer.kv_lora_rank
    if rank < layer.kv_lora_rank:
        raise ExportError(
            f"--profile vllm: zeros can widen a latent of {layer.kv_lora_rank} values, but not narrow it to "
            f"{rank}. Nothing was written. Convert the original again with --kv-lora-rank {rank} "
            f"--qk-rope-head-dim {layer.qk_rope_head_dim}."
        )
    latent = rank - layer.kv_lora_rank
    keys, values = dims.qk_nope_head_dim - nope, dims.v_head_dim - value
    heads, _, hidden = layer.q_rope_NPD.shape
    q_nope_NMD = layer.q_nope_NMD
    if q_nope_NMD is None:  # M = 0
        q_nope_NMD = layer.q_rope_NPD.new_zeros(heads, 0, hidden)
    return replace(
        layer,
        down_RD=pad(layer.down_RD, (0, 0, 0, latent)),
        up_k_GMR=pad(layer.up_k_GMR, (0, latent, 0, keys)),
        up_v_GHR=pad(layer.up_v_GHR, (0, latent, 0, values)),
        q_nope_NMD=pad(q_nope_NMD, (0, 0, 0, keys)),
        q_nope_bias_NM=_padded(layer.q_nope_bias_NM, keys),
        v_bias_GH=_padded(layer.v_bias_GH, values),
        q_rope_NPD=_spread(layer.q_rope_NPD, dims),
        k_rope_JPD=_spread(layer.k_rope_JPD, dims),
        q_rope_bias_NP=_spread_bias(layer.q_rope_bias_NP, dims),
        k_rope_bias_JP=_spread_bias(layer.k_rope_bias_JP, dims),
        inv_freq_JF=_table(layer.inv_freq_JF, rope_theta, dims),
    )


def _padded(bias_NX: Tensor | None, more: int) -> Tensor | None:
    return None if bias_NX is None else pad(bias_NX, (0, more))


def _spread(rows_NPX: Tensor, dims: HeadDims) -> Tensor:
    """Half-split pair i of a narrow RoPE key as pair i * (P'/P) of a wide one, where its frequency stands."""
    heads, width, channels = rows_NPX.shape
    wide_NPX = rows_NPX.new_zeros(heads, dims.qk_rope_head_dim, channels)
    # Both halves at once: rows i and i + P/2 become i * step and i * step + P'/2.
    wide_NPX[:, :: dims.qk_rope_head_dim // width] = rows_NPX
    return wide_NPX


def _spread_bias(bias_NP: Tensor | None, dims: HeadDims) -> Tensor | None:
    return None if bias_NP is None else _spread(bias_NP[..., None], dims)[..., 0]


def _table(inv_freq_JF: Tensor, rope_theta: float, dims: HeadDims) -> Tensor:
    """theta^(-2i/P'), with the layer's own entries where they stand; the others turn zeros."""
    width = dims.qk_rope_head_dim
    exponent_F = torch.arange(0, width, 2, dtype=torch.float64) / width
    wide_JF = (rope_theta**-exponent_F).to(inv_freq_JF).expand(len(inv_freq_JF), -1).clone()
    wide_JF[:, :: wide_JF.shape[1] // inv_freq_JF.shape[1]] = inv_freq_JF
    return wide_JF


def check_vllm_layer(facts: ModelFacts, layer: LatentLayer, layer_idx: int) -> None:
    """Refuse a converted layer with a bias or a scaled RoPE table: vLLM drops the one and misreads the other.

    Raises:
        ExportError: naming the layer.
    """
    found = [name for name in layer.tensors() if "_bias_" in name] + (["o_proj.bias"] if facts.o_bias else [])
    if found:
        raise ExportError(
            _refusal(f"layer {layer_idx}, which has {', '.join(found)}: vLLM drops attention biases")
        )
    width = layer.qk_rope_head_dim
    plain_F = facts.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    error = (layer.inv_freq_JF.double().cpu() / plain_F - 1).abs().max().item()
    if not error <= 1e-6:
        raise ExportError(
            _refusal(
                f"layer {layer_idx}, whose RoPE frequencies are not theta^(-2i/{width}) for theta "
                f"{facts.rope_theta:g}: vLLM takes every other table for YaRN"
            )
        )


def _refusal(what: str) -> str:
    return (
        f"--profile {PROFILE} cannot express {what}. Nothing was written. Choose --profile deepseek-v3, and "
        "serve it by transformers' class inside vLLM: vllm serve OUT --model-impl transformers"
    )


def write_vllm_checkpoint(
    source: Source,
    layers: Callable[[int], LatentLayer],
    folder: Path,
    dtype: torch.dtype,
    advance: Callable[[], None] = lambda: None,
    *,
    kv_lora_rank: int | None = None,
) -> dict[str, Any]:
    """Write the converted model in sizes that vLLM's kernels take.

    Args and what it returns are those of `write_deepseek_checkpoint`; also the name of every kernel of vLLM
    that takes the size, and what to warn about.

    Args:
        kv_lora_rank: see `pad_for_vllm`.

    Raises:
        ExportError: vLLM cannot express the model; nothing was written.
    """
    facts = source.facts
    for layer_idx in range(facts.num_hidden_layers):
        check_vllm_layer(facts, layers(layer_idx), layer_idx)

    def padded(layer_idx: int) -> LatentLayer:
        return pad_for_vllm(layers(layer_idx), rope_theta=facts.rope_theta, kv_lora_rank=kv_lora_rank)

    summary = write_deepseek_checkpoint(source, padded, folder, dtype, advance, own_head=True)
    first = padded(0)
    rows = kernels(
        first.kv_lora_rank, first.qk_rope_head_dim, first.up_k_GMR.shape[1], first.up_v_GHR.shape[1]
    )
    running = [row.name for row in rows if row.runs]
    return summary | {"profile": PROFILE, "kernels": running, "warnings": kernel_warnings(rows)}
