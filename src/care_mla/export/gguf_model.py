"""The profile `gguf`: one file that llama.cpp runs as a `deepseek2` model.

Reads a converted folder tensor by tensor and one factored layer at a time; writes one GGUF file. What
llama.cpp cannot express is refused by name before anything is written.

llama.cpp takes one eps for every norm. The residual stream is made 2^14 times as large and eps 2^28 times, so
that the latent, small against sqrt(eps), is still a number that float16 and the block scales of quantised
types hold.
"""
# Shapes: D hidden_size, N query heads, G KV heads, H head_dim, R kv_lora_rank, M qk_nope_head_dim,
#         P qk_rope_head_dim, F frequencies (P/2), O rows of a projection.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from torch import Tensor

from care_mla.engines import BETA_FAST, BETA_SLOW
from care_mla.errors import ExportError
from care_mla.export.deepseek import KEPT, REPLACED, layer_rope, neighbour_pairs, scaled_queries
from care_mla.export.gguf_experts import (
    PROJECTIONS,
    ROUTER,
    expert_shapes,
    expert_tensors,
    write_expert_metadata,
)
from care_mla.export.gguf_vocabulary import write_vocabulary
from care_mla.export.latent_norm import LinearNorm, latent_norm
from care_mla.export.residual import STREAM_WRITERS, residual_factor
from care_mla.factors import LatentLayer
from care_mla.facts import ModelFacts
from care_mla.families import weight_names
from care_mla.families.rope_table import written_rope
from care_mla.profiles import profile_blocker

if TYPE_CHECKING:
    from care_mla.checkpoint.source import Source
    from care_mla.export.converted import ConvertedFolder

ARCHITECTURE = "deepseek2"
# On the stream as stored. A power of two, so that no weight is rounded once more.
STREAM_SCALE = 2.0**14
# Of the latent's rms to sqrt(eps). The norm shrinks a token by half of the square: 2e-6, at most 3e-5.
TYPICAL_RATIO, MAX_RATIO = 2.0**-9, 2.0**-7
# Weights written in float16 stay below half of its range.
FLOAT16_LARGEST = 2.0**15
TYPES = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
}
# The down-projection decides every key and value and is small, so float16 and quantised files keep it finer.
LATENT_DOWN = "attn_kv_a_mqa"
MODULES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "gate": ROUTER,
    **PROJECTIONS,
}
EXPERTS = ".mlp.experts."


def check_gguf(model: ConvertedFolder, dtype: torch.dtype) -> None:
    """Refuse what llama.cpp's `deepseek2` cannot express, from headers and the tables of RoPE.

    Raises:
        ExportError: naming the feature, and what runs the model instead.
    """
    facts = model.facts
    # Of DeepSeek's two routers `deepseek2` has V2's softmax too, and its division by the sum.
    blocker = profile_blocker(facts, "deepseek-v2", engine="llama.cpp") or _rope_blocker(model)
    if blocker is None:
        known = {name for name in weight_names(facts) if KEPT.fullmatch(name) or REPLACED.fullmatch(name)}
        if lost := sorted(set(model.headers) - known - set(model.ignored())):
            layers = "deepseek2" if facts.sparse_layers else "dense deepseek2"
            blocker = f"{', '.join(lost[:3])}: a {layers} has no such tensor"
    if blocker is not None:
        instead = "folder runs in transformers as it is" if model.is_own else "folder runs as it is"
        raise ExportError(
            f"--profile gguf cannot express this {facts.family} model ({blocker}). Nothing was written. The "
            f"{instead}: care verify {model.folder} --engine transformers"
        )


def _rope_blocker(model: ConvertedFolder) -> str | None:
    """Why llama.cpp would turn keys otherwise: it computes one table for all layers, and reads none."""
    facts = model.facts
    for layer_idx in range(facts.num_hidden_layers):
        rope = written_rope(facts, model.frequencies(layer_idx).tolist())
        if rope is None or rope.parameters["rope_type"] != facts.rope_type:
            return (
                f"rope_type {facts.rope_type}: llama.cpp computes one table of frequencies for deepseek2, "
                f"and layer {layer_idx} turns by others"
            )
    return None


def write_gguf(
    source: Source,
    layers: Callable[[int], LatentLayer],
    output: Path,
    dtype: torch.dtype,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write the model as one GGUF file, a tensor at a time.

    In memory at most are one layer's attention, or one projection of all experts of a layer.

    Args:
        source: checked by `check_gguf`.
        layers: gives the factored layer of a 0-based index.
        output: the file; the caller makes it atomic.
        dtype: of the matrices. Vectors and routers are float32, and so is the latent's down-projection in
            float16 files.
        advance: called after each layer.

    Returns:
        Sizes, the scale of the residual stream, and the eps of all norms.
    """
    facts, first = source.facts, layers(0)
    scale = _stream_scale(source, dtype)
    eps = facts.rms_norm_eps * scale**2
    writer = gguf.GGUFWriter(output, ARCHITECTURE, use_temp_file=False)
    _write_metadata(writer, facts, first, eps, dtype)
    write_expert_metadata(writer, facts, scale)
    write_vocabulary(writer, source)
    shapes = _shapes(source, first)
    for name, shape in shapes.items():
        kind = _kind(name, shape, dtype)
        nbytes = math.prod(shape) * (4 if kind is gguf.GGMLQuantizationType.F32 else 2)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    expected = iter(shapes.items())
    for name, tensor in _tensors(source, layers, scale, eps, advance):
        assert (name, tuple(tensor.shape)) == next(expected), name
        writer.write_tensor_data(_packed(tensor, _kind(name, tuple(tensor.shape), dtype)))
    assert next(expected, None) is None
    writer.close()
    return {
        "kv_lora_rank": first.kv_lora_rank,
        "qk_rope_head_dim": first.qk_rope_head_dim,
        "cached_values": first.cached_values,
        "residual_scale": scale,
        "rms_norm_eps": eps,
    }


def _stream_scale(source: Source, dtype: torch.dtype) -> float:
    """2^14, or less where the largest weight that writes to the stream would leave float16's range."""
    if dtype is not torch.float16:
        return STREAM_SCALE
    largest = 0.0
    for name in source.headers:
        if name.split(".")[-2] in STREAM_WRITERS and EXPERTS not in name:
            low, high = source.tensor(name).aminmax()
            largest = max(largest, -low.item(), high.item())
    return min(STREAM_SCALE, 2.0 ** math.floor(math.log2(FLOAT16_LARGEST / largest)))


def _write_metadata(
    writer: gguf.GGUFWriter, facts: ModelFacts, layer: LatentLayer, eps: float, dtype: torch.dtype
) -> None:
    nope, rank, rope = max(1, layer.up_k_GMR.shape[1]), layer.kv_lora_rank, layer.qk_rope_head_dim
    writer.add_description("attention turned into Multi-head Latent Attention by care-mla")
    writer.add_file_type(TYPES[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(facts.vocab_size)
    writer.add_context_length(facts.max_position_embeddings)
    writer.add_embedding_length(facts.hidden_size)
    writer.add_feed_forward_length(facts.intermediate_size)
    writer.add_block_count(facts.num_hidden_layers)
    writer.add_head_count(facts.num_attention_heads)
    writer.add_head_count_kv(1)  # the latent and its RoPE key, which all heads share
    writer.add_layer_norm_rms_eps(eps)
    writer.add_rope_freq_base(facts.rope_theta)
    writer.add_rope_dimension_count(rope)
    _write_yarn(writer, layer_rope(facts, layer, 0).parameters)
    writer.add_kv_lora_rank(rank)
    # Without the key llama.cpp looks for a low-rank query in some sizes of model.
    writer.add_q_lora_rank(0)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(nope + rope)
    writer.add_value_length_mla(layer.up_v_GHR.shape[1])


def _write_yarn(writer: gguf.GGUFWriter, rope_parameters: Mapping[str, Any]) -> None:
    """YaRN with both mscales 1 and the betas that llama.cpp has; nothing where RoPE is plain."""
    if rope_parameters["rope_type"] != "yarn":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope_parameters["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope_parameters["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(BETA_FAST)
    writer.add_rope_scaling_yarn_beta_slow(BETA_SLOW)
    # 0.1 mscale_all_dim: the growth of logits' square root by ln(factor).
    writer.add_rope_scaling_yarn_log_mul(0.1)


def _gguf_name(name: str) -> str:
    """A tensor outside attention, or the output projection, under llama.cpp's name."""
    parts = name.split(".")
    module, prefix = parts[-2], f"blk.{parts[2]}." if parts[1] == "layers" else ""
    return f"{prefix}{'attn_output' if module == 'o_proj' else MODULES[module]}.{parts[-1]}"


def _shapes(source: Source, layer: LatentLayer) -> dict[str, tuple[int, ...]]:
    """Every tensor in the order in which it is written, with its shape."""
    facts = source.facts
    heads, hidden, rank, rope = (
        facts.num_attention_heads,
        facts.hidden_size,
        layer.kv_lora_rank,
        layer.qk_rope_head_dim,
    )
    nope, width = max(1, layer.up_k_GMR.shape[1]), layer.up_v_GHR.shape[1]
    attention = {
        "attn_q": (heads * (nope + rope), hidden),
        LATENT_DOWN: (rank + rope, hidden),
        "attn_kv_a_norm": (rank,),
        "attn_k_b": (heads, rank, nope),
        "attn_v_b": (heads, width, rank),
    }
    shapes = {_gguf_name(name): source.shape(name) for name in _outside(source)}
    for layer_idx in range(facts.num_hidden_layers):
        for name in _inside(source, layer_idx):
            shapes[_gguf_name(name)] = source.shape(name)
        shapes |= expert_shapes(facts, layer_idx)
        shapes |= {f"blk.{layer_idx}.{name}.weight": shape for name, shape in attention.items()}
    return shapes


def _outside(source: Source) -> list[str]:
    return [name for name in source.names() if not name.startswith("model.layers.")]


def _inside(source: Source, layer_idx: int) -> list[str]:
    prefix = f"model.layers.{layer_idx}."
    return [
        name
        for name in source.names()
        if name.startswith(prefix)
        and EXPERTS not in name
        and (KEPT.fullmatch(name) or name.endswith("o_proj.weight"))
    ]


def _tensors(
    source: Source,
    layers: Callable[[int], LatentLayer],
    scale: float,
    eps: float,
    advance: Callable[[], None],
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file by its name, in the order of `_shapes`."""

    def scaled(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        # A power of two: exact in every dtype, so nothing need be widened.
        return _gguf_name(name), tensor * residual_factor(name, source.facts, scale)

    for name in _outside(source):
        yield scaled(name, source.tensor(name))
    for layer_idx in range(source.facts.num_hidden_layers):
        layer = layers(layer_idx)
        for name in _inside(source, layer_idx):
            is_output = name.endswith("o_proj.weight")
            tensor = layer.output_weight(source.tensor(name)) if is_output else source.tensor(name)
            yield scaled(name, tensor)
        yield from expert_tensors(source, layer_idx)
        norm_D = source.tensor(f"model.layers.{layer_idx}.input_layernorm.weight")
        rope = layer_rope(source.facts, layer, layer_idx)
        tensors, _ = attention_tensors(scaled_queries(layer, rope.query_scale), norm_D, eps)
        for module, tensor in tensors.items():
            yield f"blk.{layer_idx}.{module}.weight", tensor
        advance()


def attention_tensors(
    layer: LatentLayer, input_norm_D: Tensor, eps: float
) -> tuple[dict[str, Tensor], LinearNorm]:
    """The weights of attention in float64 under llama.cpp's names, and the latent's norm.

    Args:
        layer: decoupled, without biases.
        input_norm_D: weight of `attn_norm`, which bounds the latent.
        eps: of every norm.
    """
    layer = layer.to(dtype=torch.float64)
    assert layer.k_rope_JPD is not None
    assert not any("bias" in name for name in layer.tensors())
    root = math.sqrt(eps)
    norm = latent_norm(
        layer.down_RD,
        input_norm_D,
        eps=eps,
        typical_rms=TYPICAL_RATIO * root,
        max_rms=MAX_RATIO * root,
    )
    per_group = len(layer.q_rope_NPD) // len(layer.up_k_GMR)
    up_k_NMR = (layer.up_k_GMR * norm.up_scale).repeat_interleave(per_group, dim=0)
    up_v_NHR = (layer.up_v_GHR * norm.up_scale).repeat_interleave(per_group, dim=0)
    q_NKD = neighbour_pairs(layer.q_rope_NPD, dim=1)
    nope_NMD = layer.q_nope_NMD
    if nope_NMD is None:  # llama.cpp wants at least one dimension without RoPE; zeros add nothing
        nope_NMD, up_k_NMR = torch.zeros_like(q_NKD[:, :1]), torch.zeros_like(up_v_NHR[:, :1])
    q_NKD = torch.cat((nope_NMD, q_NKD), dim=1)
    # llama.cpp divides logits by sqrt(M+P), the source by sqrt(H).
    q_NKD = q_NKD * math.sqrt(q_NKD.shape[1] / layer.up_v_GHR.shape[1])
    k_rope_PD = neighbour_pairs(layer.k_rope_JPD[0], dim=0)
    return {
        "attn_q": q_NKD.flatten(0, 1),
        LATENT_DOWN: torch.cat((layer.down_RD * norm.down_scale, k_rope_PD)),
        "attn_kv_a_norm": torch.full((layer.kv_lora_rank,), norm.weight, dtype=torch.float64),
        "attn_k_b": up_k_NMR.mT,
        "attn_v_b": up_v_NHR,
    }, norm


def _kind(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> gguf.GGMLQuantizationType:
    is_fine = len(shape) == 1 or ROUTER in name or (dtype is torch.float16 and LATENT_DOWN in name)
    return gguf.GGMLQuantizationType.F32 if is_fine else TYPES[dtype][0]


def _packed(tensor: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    dtype = next(dtype for dtype, (known, _) in TYPES.items() if known is kind)
    tensor = tensor.to(dtype).contiguous()
    # numpy has no bfloat16: the same bits go through as integers.
    return (tensor.view(torch.int16) if dtype is torch.bfloat16 else tensor).numpy()
