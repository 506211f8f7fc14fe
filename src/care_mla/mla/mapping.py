"""From factored layers to our own transformers class: state dict, configuration, attention module.

Reads `LatentLayer`s and the source's facts; writes nothing.
"""
# Shapes: D hidden_size, N query heads, G KV heads, H head_dim, R kv_lora_rank, M qk_nope_head_dim,
#         P qk_rope_head_dim, J rope-key heads, F frequencies, O columns of o_proj (N*H).

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from care_mla.configs import Form
from care_mla.errors import UnsupportedModelError
from care_mla.factors import LatentLayer
from care_mla.facts import ModelFacts, QkNorm
from care_mla.mla import configuration, modeling
from care_mla.mla.latent_attention import LatentAttention

# Source architecture -> what our classes are called: Latent<name>Config, Latent<name>ForCausalLM.
NAMES = {
    "LlamaForCausalLM": "Llama",
    "MistralForCausalLM": "Mistral",
    "MixtralForCausalLM": "Mixtral",
    "Phi3ForCausalLM": "Phi3",
    "Olmo2ForCausalLM": "Olmo2",
    "Qwen2ForCausalLM": "Qwen2",
    "Qwen3ForCausalLM": "Qwen3",
    "Qwen3MoeForCausalLM": "Qwen3Moe",
}


@dataclass(frozen=True, kw_only=True)
class LatentDims:
    """Everything about one layer that the configuration holds; only the rank may differ between layers."""

    latent_form: Form
    num_key_value_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    num_rope_key_heads: int
    q_bias: bool = False
    k_rope_bias: bool = False
    k_bias: bool = False
    v_bias: bool = False
    qk_norm: QkNorm | None = None

    @classmethod
    def of(cls, layer: LatentLayer) -> LatentDims:
        """The dimensions of a factored layer."""
        qk_norm: QkNorm | None = None
        if layer.q_norm_XH is not None:
            qk_norm = "head" if len(layer.q_norm_XH) == 1 else "full"
        return cls(
            latent_form=layer.form,
            num_key_value_heads=len(layer.up_v_GHR),
            kv_lora_rank=layer.kv_lora_rank,
            qk_nope_head_dim=layer.up_k_GMR.shape[1],
            qk_rope_head_dim=layer.qk_rope_head_dim,
            num_rope_key_heads=0 if layer.k_rope_JPD is None else layer.k_rope_JPD.shape[0],
            q_bias=layer.q_rope_bias_NP is not None or layer.q_nope_bias_NM is not None,
            k_rope_bias=layer.k_rope_bias_JP is not None,
            k_bias=layer.k_bias_GM is not None,
            v_bias=layer.v_bias_GH is not None,
            qk_norm=qk_norm,
        )


def class_names(facts: ModelFacts) -> tuple[str, str, str]:
    """Names of our configuration, decoder and language-model class for this source.

    Raises:
        UnsupportedModelError: there is none.
    """
    if facts.architecture not in NAMES:
        raise UnsupportedModelError(
            f"{facts.architecture}: the profile `care` has no class for this architecture, so the result "
            f"could not be loaded. Nothing was written. It serves {', '.join(NAMES)}; see: care inspect MODEL"
        )
    name = NAMES[facts.architecture]
    return f"Latent{name}Config", f"Latent{name}Model", f"Latent{name}ForCausalLM"


def latent_config(facts: ModelFacts, layers: Sequence[LatentLayer | LatentDims]) -> PreTrainedConfig:
    """The configuration of our own class for a model whose layers are these, in order.

    Raises:
        UnsupportedModelError: our classes cannot express the source (see `class_names`).
    """
    config_name, _, model_name = class_names(facts)
    dims = [LatentDims.of(layer) if isinstance(layer, LatentLayer) else layer for layer in layers]
    assert len(dims) == facts.num_hidden_layers, (
        f"{len(dims)} layers given, {facts.num_hidden_layers} in the model"
    )
    for layer_idx, layer in enumerate(dims):
        same = replace(dims[0], kv_lora_rank=layer.kv_lora_rank)
        assert layer == same, f"layer {layer_idx} has {layer}, layer 0 {dims[0]}: only the rank may differ"
    config_class = getattr(configuration, config_name)
    fields: dict[str, Any] = {
        **facts.config,
        **asdict(dims[0]),
        "kv_lora_rank": [layer.kv_lora_rank for layer in dims],
        "o_bias": facts.o_bias,
        "model_type": config_class.model_type,
        "architectures": [model_name],
    }
    return config_class.from_dict(fields)


def attention_state_dict(layer: LatentLayer, o_weight_DO: Tensor, o_bias: Tensor | None) -> dict[str, Tensor]:
    """The weights of `LatentAttention`, named relative to `self_attn`.

    All in the dtype and on the device of `o_weight_DO`, but the frequencies, which stay in float32.
    """
    q_parts = [part for part in (layer.q_nope_NMD, layer.q_rope_NPD) if part is not None]
    down = [layer.down_RD] + ([] if layer.k_rope_JPD is None else [layer.k_rope_JPD.flatten(0, 1)])
    tensors: dict[str, Tensor] = {
        "q_proj.weight": torch.cat(q_parts, dim=1).flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat(down),
        "v_b_proj.weight": layer.up_v_GHR.flatten(0, 1),
        "o_proj.weight": o_weight_DO,
    }
    if layer.up_k_GMR.shape[1] > 0:
        tensors["k_b_proj.weight"] = layer.up_k_GMR.flatten(0, 1)
    if layer.q_rope_bias_NP is not None or layer.q_nope_bias_NM is not None:
        tensors["q_proj.bias"] = _q_bias(layer)
    if layer.k_rope_bias_JP is not None:
        # The latent has no bias; DeepSeek's name holds both parts in one tensor.
        zeros_R = layer.k_rope_bias_JP.new_zeros(layer.kv_lora_rank)
        tensors["kv_a_proj_with_mqa.bias"] = torch.cat((zeros_R, layer.k_rope_bias_JP.flatten()))
    if layer.k_bias_GM is not None:
        tensors["k_b_proj.bias"] = layer.k_bias_GM.flatten()
    if layer.v_bias_GH is not None:
        tensors["v_b_proj.bias"] = layer.v_bias_GH.flatten()
    if o_bias is not None:
        tensors["o_proj.bias"] = o_bias
    if layer.q_norm_XH is not None:
        tensors["q_norm.weight"] = layer.q_norm_XH.flatten()
    if layer.k_norm_XH is not None:
        tensors["k_norm.weight"] = layer.k_norm_XH.flatten()
    tensors = {name: tensor.to(o_weight_DO).contiguous() for name, tensor in tensors.items()}
    inv_freq_JF = layer.inv_freq_JF.to(device=o_weight_DO.device, dtype=torch.float32)
    return tensors | {"inv_freq": inv_freq_JF.contiguous()}


def _q_bias(layer: LatentLayer) -> Tensor:
    """Biases of the queries, [nope; rope] per head, zero where one part has none: (N*(M+P),)."""
    parts = []
    for weight, bias in (
        (layer.q_nope_NMD, layer.q_nope_bias_NM),
        (layer.q_rope_NPD, layer.q_rope_bias_NP),
    ):
        if weight is not None:
            parts.append(weight.new_zeros(weight.shape[:2]) if bias is None else bias)
    return torch.cat(parts, dim=1).flatten()


def attention_module(
    config: PreTrainedConfig,
    layer_idx: int,
    layer: LatentLayer,
    o_weight_DO: Tensor,
    o_bias: Tensor | None = None,
) -> LatentAttention:
    """Latent attention that can stand in for `self_attn` of the source's own decoder layer.

    Args:
        config: from `latent_config`.
        layer_idx: 0-based; it picks the rank in `config` and the slot in the cache.
        layer: the factored layer.
        o_weight_DO: the source's output projection; the module takes its dtype and device.
        o_bias: the source's, (D,).
    """
    with torch.device("meta"):
        module = LatentAttention(config, layer_idx)
    module.load_state_dict(attention_state_dict(layer, o_weight_DO, o_bias), assign=True)
    return module.eval()


def model_class(facts: ModelFacts) -> type:
    """Our language-model class for this source."""
    return getattr(modeling, class_names(facts)[2])
