"""Stock profiles: a checkpoint that engines load as `DeepseekV3ForCausalLM`, or a class with its attention.

Reads a source checkpoint tensor by tensor and one factored layer at a time; writes safetensors shards,
`config.json` and the source's side files. What the class cannot express is refused by name before anything is
written.
"""
# Shapes: D hidden_size, N query heads, G KV heads, H head_dim, R kv_lora_rank, M qk_nope_head_dim,
#         P qk_rope_head_dim, F frequencies (P/2), K query width (M+P), X = D + 1 channels of
#         [x ; 1], O columns of o_proj (N*H) or rows of q_b_proj (N*K), S vocabulary.

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoConfig

from care_mla.checkpoint.writer import ShardWriter
from care_mla.configs import Form, Profile
from care_mla.errors import ExportError
from care_mla.export.experts import expert_config, expert_tensors, mistral4_config
from care_mla.export.latent_norm import NORM_EPS, LinearNorm, latent_norm, query_norm, refuse_float16
from care_mla.export.residual import residual_factor, residual_scale
from care_mla.factors import LatentLayer
from care_mla.facts import ModelFacts
from care_mla.families.rope_table import WrittenRope, plain_frequencies, written_rope
from care_mla.mla.mapping import LatentDims
from care_mla.profiles import check_profile, engine_verdicts
from care_mla.workspace import write_json

if TYPE_CHECKING:
    from care_mla.checkpoint.source import Source

PROFILE: Profile = "deepseek-v3"
KEPT = re.compile(
    r"model\.(embed_tokens|norm)\.weight|lm_head\.weight|model\.layers\.\d+\."
    r"((input|post_attention)_layernorm|mlp\.(gate|up|down)_proj|mlp\.gate|"
    r"mlp\.experts\.\d+\.(gate|up|down)_proj)\.weight"
)
REPLACED = re.compile(r"model\.layers\.\d+\.self_attn\.[qkvo]_proj\.(weight|bias)")
# A decoupled layer has linear maps in place of projections with QK-norm (decompose/qk_norm.py).
QK_NORMS = re.compile(r"model\.layers\.\d+\.self_attn\.[qk]_norm\.weight")


def check_deepseek(
    facts: ModelFacts,
    form: Form,
    *,
    dtype: torch.dtype,
    profile: Profile = PROFILE,
    engine: str = "transformers",
) -> None:
    """Refuse what a stock class cannot express, from what is known before any work.

    Args:
        form: of the conversion.
        dtype: of the weights to be written.
        profile: which class it is.
        engine: that must run it exactly.

    Raises:
        ExportError: the message names the feature, and what to type.
    """
    check_profile(facts, profile, engine=engine)
    refuse_float16(dtype)
    _check_form(form, profile)


def _check_form(form: Form, profile: Profile) -> None:
    if form != "decoupled":
        raise ExportError(
            f"--profile {profile} cannot express --form {form}: its RoPE key is one for all heads. Nothing "
            "was written. Choose --form decoupled, or --profile care."
        )


def layer_rope(facts: ModelFacts, layer: LatentLayer, layer_idx: int) -> WrittenRope:
    """How the configuration says a layer's table of RoPE frequencies.

    Raises:
        ExportError: it cannot; naming the layer.
    """
    found_F = layer.inv_freq_JF[0].double().cpu()
    rope = written_rope(facts, found_F.tolist())
    if rope is None:
        expected = plain_frequencies(facts.rope_theta, layer.qk_rope_head_dim)
        raise ExportError(
            f"Stock profiles: layer {layer_idx} has RoPE frequencies {found_F.tolist()[:4]}…, but the "
            f"class computes theta^(-2i/P) for theta {facts.rope_theta:g}, P {layer.qk_rope_head_dim} "
            f"({expected[:4]}…) or the source's scaling of them, so that keys would turn wrongly. Nothing "
            "was written. Choose --profile care, which stores any table."
        )
    return rope


def scaled_queries(layer: LatentLayer, factor: float) -> LatentLayer:
    """A decoupled layer with all of its logits multiplied by a factor."""

    def scaled(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor * factor

    return replace(
        layer,
        q_rope_NPD=layer.q_rope_NPD * factor,
        q_nope_NMD=scaled(layer.q_nope_NMD),
        q_rope_bias_NP=scaled(layer.q_rope_bias_NP),
        q_nope_bias_NM=scaled(layer.q_nope_bias_NM),
    )


def written_facts(facts: ModelFacts, layer: LatentLayer, rope: WrittenRope) -> ModelFacts:
    """The source's facts with the RoPE, the biases and the norms that a decoupled layer has."""
    return replace(
        facts,
        rope_parameters=rope.parameters,
        rotary_dim=layer.qk_rope_head_dim,
        q_bias=layer.q_rope_bias_NP is not None or layer.q_nope_bias_NM is not None,
        k_bias=layer.k_rope_bias_JP is not None,
        v_bias=layer.v_bias_GH is not None,
        qk_norm=None,
    )


def deepseek_config(
    facts: ModelFacts,
    dims: Sequence[LatentDims],
    dtype: torch.dtype,
    rope_parameters: dict[str, Any],
    profile: Profile = PROFILE,
) -> dict[str, Any]:
    """The `config.json` of a DeepSeek model with these layers (all of one size), in V3's words."""
    source = dict(facts.config)
    # Keys that the source leaves out have other defaults in DeepSeek's class than in the source's.
    stock = AutoConfig.for_model(source.pop("model_type"), **source)
    has_query_bias = any(layer.q_bias for layer in dims)
    has_bias = facts.o_bias or any(layer.q_bias or layer.k_rope_bias or layer.v_bias for layer in dims)
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": facts.hidden_size,
        "intermediate_size": facts.intermediate_size,
        "num_hidden_layers": facts.num_hidden_layers,
        "num_attention_heads": facts.num_attention_heads,
        "num_key_value_heads": facts.num_attention_heads,
        "vocab_size": facts.vocab_size,
        "max_position_embeddings": facts.max_position_embeddings,
        "kv_lora_rank": dims[0].kv_lora_rank,
        "q_lora_rank": facts.hidden_size + 1 if has_query_bias else None,
        "qk_nope_head_dim": dims[0].qk_nope_head_dim,
        "qk_rope_head_dim": dims[0].qk_rope_head_dim,
        "v_head_dim": facts.head_dim,
        "attention_bias": has_bias,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": rope_parameters,
        "rope_interleave": True,
        "tie_word_embeddings": facts.tie_word_embeddings,
        "hidden_act": "silu",
        "attention_dropout": stock.attention_dropout,
        "initializer_range": stock.initializer_range,
        "use_cache": True,
        "bos_token_id": stock.bos_token_id,
        "eos_token_id": stock.eos_token_id,
        "pad_token_id": stock.pad_token_id,
        # Engines want a mixture of experts described in a dense model too; no weights belong to it.
        **expert_config(facts, profile),
        "num_nextn_predict_layers": 0,
        "dtype": str(dtype).removeprefix("torch."),
    }


def neighbour_pairs(rows: Tensor, dim: int) -> Tensor:
    """Half-split RoPE pairs (i, i + P/2) along `dim`, reordered to DeepSeek's (2i, 2i + 1)."""
    return rows.unflatten(dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def attention_tensors(
    layer: LatentLayer,
    input_norm_D: Tensor,
    o_weight_DO: Tensor,
    o_bias_D: Tensor | None,
    *,
    has_bias: bool,
    has_query_bias: bool,
    stream_scale: float = 1.0,
) -> tuple[dict[str, Tensor], LinearNorm]:
    """The weights of `DeepseekV3Attention` in float64, named relative to `self_attn`, and the latent's norm.

    Args:
        layer: decoupled.
        input_norm_D: weight of `input_layernorm`, which bounds the latent.
        o_weight_DO: the source's output projection, for a layer without its own; `o_bias_D`: its bias.
        has_bias: whether the configuration says `attention_bias`; tensors without one get zeros.
        has_query_bias: whether queries take the way through [x ; 1], which alone gives them a bias.
        stream_scale: of the residual stream (residual.py).
    """
    layer = layer.to(dtype=torch.float64)
    assert layer.k_rope_JPD is not None
    assert layer.q_norm_XH is None and layer.k_norm_XH is None, "no norm in a decoupled layer"  # noqa: PT018
    assert len(layer.k_rope_JPD) == 1
    heads, value = len(layer.q_rope_NPD), layer.up_v_GHR.shape[1]
    head_dim = o_weight_DO.shape[1] // heads
    # Values may be wider than the source's, in zeros, for engines' sake (vllm.py).
    o_weight_DO = layer.output_weight(o_weight_DO)
    o_weight_DO = pad(o_weight_DO.unflatten(1, (heads, head_dim)), (0, value - head_dim)).flatten(1)
    norm = latent_norm(layer.down_RD, input_norm_D)
    up_GKR = torch.cat((layer.up_k_GMR, layer.up_v_GHR), dim=1) * norm.up_scale
    per_group = heads // len(up_GKR)
    k_rope_PD = neighbour_pairs(layer.k_rope_JPD[0], dim=0)
    tensors = {
        "kv_a_proj_with_mqa.weight": torch.cat((layer.down_RD * norm.down_scale, k_rope_PD)),
        "kv_a_layernorm.weight": torch.full((layer.kv_lora_rank,), norm.weight, dtype=torch.float64),
        "kv_b_proj.weight": up_GKR.repeat_interleave(per_group, dim=0).flatten(0, 1),
        "o_proj.weight": o_weight_DO.double() * stream_scale,
    }
    tensors |= _query_tensors(layer, input_norm_D, head_dim, has_bias=has_query_bias)
    if has_bias:
        tensors["kv_a_proj_with_mqa.bias"] = _rope_key_bias(layer)
        tensors["o_proj.bias"] = _output_bias(layer, o_weight_DO, o_bias_D) * stream_scale
    return tensors, norm


def _queries(nope_NMD: Tensor | None, rope_NPD: Tensor, head_dim: int) -> Tensor:
    """[nope ; rope] rows of every head: (N*K, D).

    DeepSeek divides logits by sqrt(M+P), the source by sqrt(H): queries make up for it.
    """
    rope_NPD = neighbour_pairs(rope_NPD, dim=1)
    q_NKD = rope_NPD if nope_NMD is None else torch.cat((nope_NMD, rope_NPD), dim=1)
    return q_NKD.flatten(0, 1) * math.sqrt(q_NKD.shape[1] / head_dim)


def _query_tensors(
    layer: LatentLayer, input_norm_D: Tensor, head_dim: int, *, has_bias: bool
) -> dict[str, Tensor]:
    """Queries; with a bias, q_a gives [x ; 1] through a linear norm and q_b is [W_q, b_q]."""
    nope_NMD, rope_NPD = layer.q_nope_NMD, layer.q_rope_NPD
    if not has_bias:
        return {"q_proj.weight": _queries(nope_NMD, rope_NPD, head_dim)}
    hidden = rope_NPD.shape[2]
    if nope_NMD is not None:
        nope_NMD = _with_bias(nope_NMD, layer.q_nope_bias_NM)
    q_b_OX = _queries(nope_NMD, _with_bias(rope_NPD, layer.q_rope_bias_NP), head_dim)
    norm = query_norm(input_norm_D)
    eye_XX = torch.eye(hidden + 1, dtype=torch.float64) * norm.down_scale
    return {
        "q_a_proj.weight": eye_XX[:, :hidden],
        "q_a_proj.bias": eye_XX[:, hidden],
        "q_a_layernorm.weight": torch.full((hidden + 1,), norm.weight, dtype=torch.float64),
        "q_b_proj.weight": q_b_OX * norm.up_scale,
    }


def _with_bias(weight_NPD: Tensor, bias_NP: Tensor | None) -> Tensor:
    """The bias as one more column: (N, P, X)."""
    bias_NP = torch.zeros_like(weight_NPD[..., 0]) if bias_NP is None else bias_NP
    return torch.cat((weight_NPD, bias_NP[..., None]), dim=-1)


def _rope_key_bias(layer: LatentLayer) -> Tensor:
    """[0 ; bias of the rope key]: (R+P,)."""
    bias_R = layer.down_RD.new_zeros(layer.kv_lora_rank)
    bias_JP = layer.k_rope_bias_JP
    bias_P = bias_R.new_zeros(layer.qk_rope_head_dim)
    if bias_JP is not None:
        bias_P = neighbour_pairs(bias_JP[0], dim=0)
    return torch.cat((bias_R, bias_P))


def _output_bias(layer: LatentLayer, o_weight_DO: Tensor, o_bias_D: Tensor | None) -> Tensor:
    """The source's, and the values' bias sent through `o_proj`: attention weights sum to 1."""
    bias_D = o_weight_DO.new_zeros(len(o_weight_DO)) if o_bias_D is None else o_bias_D
    bias_D = bias_D.to(layer.down_RD)
    if layer.v_bias_GH is None:
        return bias_D
    per_group = len(layer.q_rope_NPD) // len(layer.v_bias_GH)
    return bias_D + o_weight_DO.to(bias_D) @ layer.v_bias_GH.repeat_interleave(per_group, dim=0).flatten()


def write_deepseek_checkpoint(
    source: Source,
    layers: Callable[[int], LatentLayer],
    folder: Path,
    dtype: torch.dtype,
    advance: Callable[[], None] = lambda: None,
    *,
    profile: Profile = PROFILE,
    engine: str = "transformers",
    own_head: bool = False,
) -> dict[str, Any]:
    """Write the converted model; one layer and one shard are in memory at a time.

    Args:
        source: checked (`Source.check`).
        layers: gives the factored layer of a 0-based index; asked twice, so that all are checked before
            anything is written.
        folder: created; the caller makes the whole folder atomic.
        dtype: of all weights.
        advance: called after each layer.
        profile: whose class it is for; of deepseek-v2 only the name is left to the caller (stock.py).
        engine: that must run it exactly.
        own_head: write a tied head as a tensor of its own, for engines that do not tie it.

    Returns:
        What the export decided, for the model card: sizes, RoPE, which engines run it exactly, the scale of
        the residual stream, and the bound and scales of each layer's norm.

    Raises:
        ExportError: the class cannot express the model, or a tensor of the source has no place in it.
    """
    facts = source.facts
    dims, rope, written = _checked_dims(source, layers, dtype, profile, engine)
    config = deepseek_config(facts, dims, dtype, rope.parameters, profile)
    config["v_head_dim"] = layers(0).up_v_GHR.shape[1]
    has_query_bias = config["q_lora_rank"] is not None
    writer = ShardWriter(folder)
    for name in source.names():
        if KEPT.fullmatch(name) and ".mlp.experts." not in name:
            writer.add(name, _scaled(source.tensor(name), residual_factor(name, facts), dtype))
    if own_head and facts.tie_word_embeddings:
        name = "model.embed_tokens.weight"
        head_SD = _scaled(source.tensor(name), residual_factor(name, facts), dtype)
        writer.add("lm_head.weight", head_SD.clone())
        config["tie_word_embeddings"] = False
        written = replace(written, tie_word_embeddings=False)
    norms = []
    for layer_idx in range(facts.num_hidden_layers):
        prefix = f"model.layers.{layer_idx}."
        tensors, norm = attention_tensors(
            scaled_queries(layers(layer_idx), rope.query_scale),
            source.tensor(f"{prefix}input_layernorm.weight"),
            source.tensor(f"{prefix}self_attn.o_proj.weight"),
            source.tensor(f"{prefix}self_attn.o_proj.bias") if facts.o_bias else None,
            has_bias=config["attention_bias"],
            has_query_bias=has_query_bias,
            stream_scale=residual_scale(facts),
        )
        for name, tensor in tensors.items():
            writer.add(f"{prefix}self_attn.{name}", tensor.to(dtype))
        for name, tensor in expert_tensors(source, profile, layer_idx, dtype).items():
            writer.add(prefix + name, tensor)
        norms.append(norm)
        advance()
    writer.close()
    if profile == "mistral4":
        config = mistral4_config(config, facts, dims)
    write_json(folder / "config.json", config)
    source.save_side_files(folder)
    return {
        "profile": profile,
        **{key: config[key] for key in ("kv_lora_rank", "qk_rope_head_dim", "q_lora_rank")},
        "cached_values": dims[0].kv_lora_rank + dims[0].qk_rope_head_dim,
        "rope_parameters": rope.parameters,
        "engines": engine_verdicts(written, profile),
        "residual_scale": residual_scale(facts),
        "latent_norms": [asdict(norm) for norm in norms],
    }


def _checked_dims(
    source: Source, layers: Callable[[int], LatentLayer], dtype: torch.dtype, profile: Profile, engine: str
) -> tuple[list[LatentDims], WrittenRope, ModelFacts]:
    """Sizes of all layers, the RoPE that they share, and `written_facts`, after every check."""
    facts = written = source.facts
    dims, ropes = [], []
    for layer_idx in range(facts.num_hidden_layers):
        layer = layers(layer_idx)
        dims.append(LatentDims.of(layer))
        _check_form(layer.form, profile)
        ropes.append(layer_rope(facts, layer, layer_idx))
        written = written_facts(facts, layer, ropes[-1])
        check_deepseek(written, layer.form, dtype=dtype, profile=profile, engine=engine)
    ranks = {layer.kv_lora_rank for layer in dims}
    if len(ranks) > 1:
        raise ExportError(
            f"--profile {profile} cannot express ranks per layer ({min(ranks)} to {max(ranks)}): stock "
            "engines read one kv_lora_rank. Nothing was written. Choose --allocation uniform, or --profile "
            "care."
        )
    names = set(source.headers) - set(source.ignored())
    places = [KEPT, REPLACED] if facts.qk_norm is None else [KEPT, REPLACED, QK_NORMS]
    if lost := sorted(name for name in names if not any(place.fullmatch(name) for place in places)):
        raise ExportError(
            f"{source.name}: {', '.join(lost[:3])} has no place in a {profile} checkpoint, and dropping it "
            "would change the model. Nothing was written. Choose --profile care."
        )
    widths = sorted({(layer.qk_nope_head_dim, layer.qk_rope_head_dim) for layer in dims})
    assert len(widths) == 1, f"(M, P) differ between layers: {widths}"
    assert all(rope == ropes[0] for rope in ropes), "RoPE differs between layers"
    return dims, ropes[0], written


def _scaled(tensor: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if factor == 1 else (tensor.double() * factor).to(dtype)
