"""From a `config.json` to `ModelFacts`, or a refusal that names what blocks. No files, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from care_mla.errors import UnsupportedModelError
from care_mla.facts import ModelFacts
from care_mla.families.base import Experts, Family
from care_mla.families.llama import LLAMA
from care_mla.families.mistral import MISTRAL
from care_mla.families.mixtral import MIXTRAL
from care_mla.families.olmo2 import OLMO2
from care_mla.families.phi3 import PHI3
from care_mla.families.qwen2 import QWEN2
from care_mla.families.qwen3 import QWEN3
from care_mla.families.qwen3_moe import QWEN3_MOE
from care_mla.families.rope import rope_parameters, rotary_dim
from care_mla.families.rope_scaling import check_factors, switches_table

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "MixtralForCausalLM": MIXTRAL,
    "Olmo2ForCausalLM": OLMO2,
    "Phi3ForCausalLM": PHI3,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
}

# Why well-known architectures are refused; the first key that starts the architecture's name is taken.
BLOCKERS: dict[str, str] = {
    "Deepseek": "it has Multi-head Latent Attention already, or experts that all tokens share",
    "Qwen3": "of the Qwen3 models only the language models, dense or with plain experts, are known",
    "Qwen2Moe": "beside its mixture of experts all tokens share one, through a gate of its own",
    "Qwen2VL": "it is multimodal",
    "Gemma3": "it normalises queries and keys per head (QK-norm) and mixes sliding with full attention",
    "Gemma2": "it caps attention logits and output logits (soft-capping)",
    "Gemma": "its norms add one to their weight, its embeddings are scaled, and its MLP is a GELU's",
    "Olmo3": "it normalises queries and keys (QK-norm), and mixes sliding with full attention",
    "Cohere": "it may normalise queries and keys (QK-norm), uses LayerNorm and parallel blocks",
    "Llama4": "it is a mixture of experts, normalises queries and keys (QK-norm) and skips RoPE in some "
    "layers",
    "SmolLM3": "it skips RoPE in some layers",
    "Phi3Small": "it attends to blocks of tokens (block-sparse attention) and uses LayerNorm",
    "Phi3V": "it is multimodal",
    "Phi4MM": "it is multimodal",
    "Phi4Multimodal": "it is multimodal",
    "Phi4Flash": "it mixes attention with a state-space model",
    "Phimoe": "its experts are chosen by another router (sparse mixer), and it uses LayerNorm",
    "PhiMoE": "its experts are chosen by another router (sparse mixer), and it uses LayerNorm",
    "Phi": "it rotates a part of each head (partial_rotary_factor) and uses LayerNorm",
    "GPT2": "it has learned positions instead of RoPE",
    "GPTNeoX": "it uses LayerNorm and an MLP without gate",
    "Falcon": "it uses LayerNorm and an MLP without gate",
    "Olmoe": "it normalises queries and keys (QK-norm)",
    "GptOss": "its attention has sinks, and its experts have biases and another activation",
    "Ministral": "it mixes sliding with full attention",
}
INTEGERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def facts_from_config(config: Mapping[str, Any]) -> ModelFacts:
    """The facts of a supported model, with every absent key filled in as transformers would.

    Args:
        config: the content of `config.json`, old spellings (`rope_theta`, `torch_dtype`) included.

    Raises:
        UnsupportedModelError: the model cannot be converted; the message names the feature that blocks.
    """
    family = _family(config)
    where = family.architecture
    _refuse_features(config, family)
    full: dict[str, Any] = {**family.defaults, "hidden_act": "silu", "tie_word_embeddings": False, **config}
    if full.get("num_key_value_heads") is None:
        full["num_key_value_heads"] = full["num_attention_heads"]
    _check_numbers(full, where)
    if full.get("head_dim") is None:
        full["head_dim"] = full["hidden_size"] // full["num_attention_heads"]
    _check_dimensions(full, where)
    if blockers := family.blockers(full):
        raise UnsupportedModelError(f"{where}: {'; '.join(blockers)}. Choose a model without this feature.")
    rope = rope_parameters(full, where)
    rotary = rotary_dim(full, rope, where, is_heeded=family.has_partial_rotary)
    check_factors(rope, rotary // 2, where)
    if switches_table(rope):
        # A converted model has the one table for these positions, so nothing is measured beyond them.
        full["max_position_embeddings"] = min(
            full["max_position_embeddings"], rope["original_max_position_embeddings"]
        )
    experts = family.experts(full) if family.experts is not None else None
    _check_experts(experts, where)
    routing: dict[str, Any] = {} if experts is None else asdict(experts)
    biases = family.biases(full)
    dtype = str(full.get("dtype") or full.get("torch_dtype") or "float32").removeprefix("torch.")
    for old in ("rope_theta", "rope_scaling", "torch_dtype", "partial_rotary_factor"):
        full.pop(old, None)
    full |= {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "rope_parameters": rope,
        "dtype": dtype,
    }
    return ModelFacts(
        family=family.name,
        architecture=family.architecture,
        model_type=family.model_type,
        rms_norm_eps=float(full["rms_norm_eps"]),
        rope_theta=rope["rope_theta"],
        rope_parameters=rope,
        tie_word_embeddings=bool(full["tie_word_embeddings"]),
        q_bias=biases.q,
        k_bias=biases.k,
        v_bias=biases.v,
        o_bias=biases.o,
        mlp_bias=biases.mlp,
        sliding_window=family.sliding_window(full),
        rotary_dim=rotary,
        **routing,
        qk_norm=family.qk_norm,
        is_post_norm=family.is_post_norm,
        dtype=dtype,
        config=full,
        **{key: full[key] for key in INTEGERS},
    )


def family_of(facts: ModelFacts) -> Family:
    """The family that facts came from."""
    return FAMILIES[facts.architecture]


def _family(config: Mapping[str, Any]) -> Family:
    """The family of a configuration, by `architectures`, or by `model_type` where that is absent."""
    names = config.get("architectures") or [f.architecture for f in FAMILIES.values() if _has_type(f, config)]
    name = names[0] if names else None
    if name in FAMILIES:
        return FAMILIES[name]
    supported = ", ".join(FAMILIES)
    if name is None:
        raise UnsupportedModelError(
            f"config.json names no known model: architectures {config.get('architectures')!r}, model_type "
            f"{config.get('model_type')!r}. Supported: {supported}."
        )
    reason = next((why for start, why in BLOCKERS.items() if name.startswith(start)), None)
    if reason is None and not name.endswith("ForCausalLM"):
        reason = _feature(config) or _experts(config) or "it is no causal language model with its head"
    reason = reason or _feature(config) or _experts(config) or "its layers are unknown to this tool"
    raise UnsupportedModelError(
        f"architecture {name!r} cannot be converted: {reason}. Nothing was written. Choose a model of a "
        f"supported architecture: {supported}."
    )


def _has_type(family: Family, config: Mapping[str, Any]) -> bool:
    return family.model_type == config.get("model_type")


def _feature(config: Mapping[str, Any]) -> str | None:
    """The feature in a configuration that no supported architecture has, whatever the model is called."""
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        return f"its weights are quantised (quantization_config: {method}); use the unquantised checkpoint"
    if config.get("kv_lora_rank"):
        return "it has Multi-head Latent Attention already (kv_lora_rank)"
    if config.get("is_encoder_decoder"):
        return "it is an encoder-decoder (is_encoder_decoder)"
    if any(config.get(key) for key in ("use_qk_norm", "qk_norm", "qk_layernorm")):
        return "it normalises queries and keys (QK-norm)"
    caps = [key for key in ("attn_logit_softcapping", "final_logit_softcapping") if config.get(key)]
    if caps:
        return f"it caps logits ({caps[0]})"
    if "text_config" in config or "vision_config" in config:
        return "it is multimodal (text_config, vision_config)"
    own_code = [value for key, value in (config.get("auto_map") or {}).items() if key.startswith("AutoModel")]
    if own_code:
        return f"it brings its own modelling code ({own_code[0]}), whose formulas are unknown"
    return None


def _experts(config: Mapping[str, Any]) -> str | None:
    """That a configuration has experts, by the key that says so."""
    keys = [key for key in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(key)]
    return f"it is a mixture of experts ({keys[0]})" if keys else None


def _refuse_features(config: Mapping[str, Any], family: Family) -> None:
    where = family.architecture
    feature = _feature(config) or (_experts(config) if family.experts is None else None)
    if feature is not None:
        raise UnsupportedModelError(
            f"{where}: {feature}. Nothing was written. Choose a model without this feature."
        )
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise UnsupportedModelError(
            f"{where}: hidden_act is {act!r}, and the conversion keeps the gated MLP with 'silu' only. "
            "Nothing was written. Choose a model with hidden_act 'silu'."
        )


def _check_numbers(full: Mapping[str, Any], where: str) -> None:
    for key in INTEGERS:
        value = full.get(key)
        if key == "head_dim" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UnsupportedModelError(
                f"{where}: {key} is {value!r} in config.json, expected a positive integer, the same for all "
                "layers."
            )
    eps = full["rms_norm_eps"]
    if not isinstance(eps, int | float) or not 0 < eps < 1:
        raise UnsupportedModelError(
            f"{where}: rms_norm_eps is {eps!r} in config.json, expected a small number."
        )


def _check_experts(experts: Experts | None, where: str) -> None:
    if experts is None:
        return
    sizes = asdict(experts)
    for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        value = sizes[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UnsupportedModelError(
                f"{where}: {key} is {value!r} in config.json, expected a positive integer. Correct it."
            )
    if experts.num_experts_per_tok > experts.num_experts:
        raise UnsupportedModelError(
            f"{where}: num_experts_per_tok is {experts.num_experts_per_tok}, and there are only "
            f"{experts.num_experts} experts. Correct config.json."
        )


def _check_dimensions(full: Mapping[str, Any], where: str) -> None:
    heads, kv_heads, head_dim = full["num_attention_heads"], full["num_key_value_heads"], full["head_dim"]
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"{where}: {heads} query heads cannot share {kv_heads} KV heads evenly. Correct config.json."
        )
    if head_dim % 2:
        raise UnsupportedModelError(
            f"{where}: head_dim is {head_dim}. RoPE turns pairs, so it must be even. Choose another model."
        )
