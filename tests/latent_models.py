"""Latent layers and models for the tests: equal to the source, or unlike any stock class."""
# Shapes: see care_mla/mla/latent_attention.py.

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from care_mla.factors import LatentLayer
from care_mla.facts import ModelFacts
from care_mla.families.registry import facts_from_config
from care_mla.mla.mapping import attention_state_dict, latent_config, model_class

from pico import LLAMA3_ROPE

N, G, H, D = 4, 2, 16, 64
FORMS = ("exact-rope", "exact-rope qk-norm head", "exact-rope qk-norm full", "decoupled", "partial-rope")
SOURCES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama-biases-untied-llama3": {
        "family": "llama", "attention_bias": True, "mlp_bias": True, "tied": False, "rope": LLAMA3_ROPE,
    },
    "mistral-window": {"family": "mistral", "sliding_window": 8, "tied": False},
    "qwen2": {"family": "qwen2"},
    "mixtral": {"family": "mixtral", "sliding_window": 8, "tied": False},
    "yarn": {
        "family": "llama",
        "rope": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256,
        },
    },
}  # fmt: skip


# These have the exact-rope form alone at full rank: no other keeps their norms.
NORMED_SOURCES: dict[str, dict[str, Any]] = {
    "qwen3": {"family": "qwen3"},
    "qwen3-biases-untied-llama3": {
        "family": "qwen3", "attention_bias": True, "tied": False, "rope": LLAMA3_ROPE,
    },
    "olmo2": {"family": "olmo2"},
    "olmo2-one-kv-head": {"family": "olmo2", "kv_heads": 1, "attention_bias": True, "tied": False},
}  # fmt: skip


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def facts_of(model: PreTrainedModel) -> ModelFacts:
    """The facts of a live model."""
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return facts_from_config(config)


def heads(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.detach().unflatten(0, (-1, H))


def norm(attention: Any, name: str) -> Tensor | None:
    """Weights of a norm of queries or keys, (1, H) or (heads, H), where there is one."""
    module = getattr(attention, name, None)
    return None if module is None else heads(module.weight)


def exact_layer(model: PreTrainedModel, layer_idx: int) -> LatentLayer:
    """Full rank: the latent is the keys and values themselves."""
    attention = model.model.layers[layer_idx].self_attn
    rows = attention.k_proj.weight.shape[0]
    eye = torch.eye(2 * rows).unflatten(0, (-1, H))
    return LatentLayer(
        form="exact-rope",
        down_RD=torch.cat((attention.k_proj.weight, attention.v_proj.weight)).detach(),
        up_k_GMR=eye[: rows // H],
        up_v_GHR=eye[rows // H :],
        q_rope_NPD=heads(attention.q_proj.weight),
        inv_freq_JF=model.model.rotary_emb.inv_freq[None],
        q_rope_bias_NP=heads(attention.q_proj.bias),
        k_bias_GM=heads(attention.k_proj.bias),
        v_bias_GH=heads(attention.v_proj.bias),
        q_norm_XH=norm(attention, "q_norm"),
        k_norm_XH=norm(attention, "k_norm"),
    )


def partial_layer(model: PreTrainedModel, layer_idx: int) -> LatentLayer:
    """All of every key is a rope key, and the latent is the values themselves."""
    attention = model.model.layers[layer_idx].self_attn
    return replace(
        exact_layer(model, layer_idx),
        form="partial-rope",
        down_RD=attention.v_proj.weight.detach(),
        up_k_GMR=torch.zeros(G, 0, G * H),
        up_v_GHR=torch.eye(G * H).unflatten(0, (G, H)),
        inv_freq_JF=model.model.rotary_emb.inv_freq.expand(G, -1),
        k_rope_JPD=heads(attention.k_proj.weight),
        k_rope_bias_JP=heads(attention.k_proj.bias),
        k_bias_GM=None,
    )


def random_layer(form: str, rank: int, seed: int, *, biases: bool = True) -> LatentLayer:
    """Weights of no source: M, P, frequencies and biases differ from anything that a stock class could do.

    Args:
        form: one of FORMS, which tell the norm of queries and keys too.
    """
    form, _, qk_norm = form.partition(" qk-norm ")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    def bias(*shape: int) -> Tensor | None:
        return draw(*shape, scale=0.5) if biases else None

    rope_heads = {"exact-rope": 0, "decoupled": 1, "partial-rope": G}[form]
    width_p, width_m = (6, 10) if rope_heads else (H, H)
    return LatentLayer(
        form=form,
        down_RD=draw(rank, D, scale=D**-0.5),
        up_k_GMR=draw(G, width_m, rank, scale=2 * rank**-0.5),
        up_v_GHR=draw(G, H, rank, scale=rank**-0.5),
        q_rope_NPD=draw(N, width_p, D, scale=2 * D**-0.5),
        inv_freq_JF=torch.rand(max(rope_heads, 1), width_p // 2, generator=generator),
        q_nope_NMD=draw(N, width_m, D, scale=2 * D**-0.5) if rope_heads else None,
        k_rope_JPD=draw(rope_heads, width_p, D, scale=2 * D**-0.5) if rope_heads else None,
        q_rope_bias_NP=bias(N, width_p),
        q_nope_bias_NM=bias(N, width_m) if rope_heads else None,
        k_rope_bias_JP=bias(rope_heads, width_p) if rope_heads else None,
        k_bias_GM=None if rope_heads else bias(G, H),
        v_bias_GH=bias(G, H),
        q_norm_XH=1 + draw(N if qk_norm == "full" else 1, H, scale=0.3) if qk_norm else None,
        k_norm_XH=1 + draw(G if qk_norm == "full" else 1, H, scale=0.3) if qk_norm else None,
    )


def converted(source: PreTrainedModel, layers: list[LatentLayer], **config_overrides: Any) -> PreTrainedModel:
    """Our model class with the source's other weights."""
    facts = facts_of(source)
    config = latent_config(facts, layers)
    for key, value in config_overrides.items():
        setattr(config, key, value)
    state = {name: t for name, t in source.state_dict().items() if ".self_attn." not in name}
    for layer_idx, layer in enumerate(layers):
        o_proj = source.model.layers[layer_idx].self_attn.o_proj
        for name, tensor in attention_state_dict(layer, o_proj.weight, o_proj.bias).items():
            state[f"model.layers.{layer_idx}.self_attn.{name}"] = tensor
    model = model_class(facts)(config)
    model.load_state_dict(state)
    return model.eval()


def random_model(source: PreTrainedModel, form: str, **config_overrides: Any) -> PreTrainedModel:
    return converted(source, [random_layer(form, 20, 0), random_layer(form, 12, 1)], **config_overrides)
