"""What stock MLA classes need to route a mixture of experts as the source does.

DeepSeek-V2 and Mistral 4 take a softmax over the router's logits, DeepSeek-V3 a sigmoid. All tokens share an
expert in them, which the source has not: it gets no width, or weights of zero.
"""
# Shapes: D hidden_size, I width of all shared experts.

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from care_mla.checkpoint.spelling import stacked_experts
from care_mla.configs import Profile
from care_mla.export.residual import residual_scale
from care_mla.facts import ModelFacts
from care_mla.families import layer_weight_names
from care_mla.mla.mapping import LatentDims

if TYPE_CHECKING:
    from care_mla.checkpoint.source import Source

# transformers lets the shared expert be 0 wide. vLLM's kernels do not, and its absence (null) is nothing that
# transformers' configuration can say.
SHARED_EXPERTS: dict[Profile, int] = {"deepseek-v2": 1, "mistral4": 0}


def expert_config(facts: ModelFacts, profile: Profile) -> dict[str, Any]:
    """Keys of `config.json` about experts; a dense model gets those of an expert that no layer has."""
    if not facts.sparse_layers:
        return {
            "first_k_dense_replace": facts.num_hidden_layers,
            "n_routed_experts": 2,
            "n_shared_experts": 1,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 8,
        }
    return {
        "first_k_dense_replace": min(facts.sparse_layers),
        "n_routed_experts": facts.num_experts,
        "n_shared_experts": SHARED_EXPERTS[profile],
        "num_experts_per_tok": facts.num_experts_per_tok,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": facts.moe_intermediate_size,
        "norm_topk_prob": facts.norm_topk_prob,
        # The scale of the residual stream, which so leaves the experts untouched (residual.py).
        "routed_scaling_factor": facts.routed_scaling_factor * residual_scale(facts),
        "scoring_func": "softmax",
        "topk_method": "greedy",
    }


def expert_tensors(source: Source, profile: Profile, layer_idx: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A layer's experts, and the shared one that adds nothing, by names relative to the layer."""
    facts = source.facts
    if layer_idx not in facts.sparse_layers:
        return {}
    experts = {
        name: source.tensor(f"model.layers.{layer_idx}.{name}").to(dtype)
        for name in layer_weight_names(facts, layer_idx)
        if name.startswith("mlp.experts.")
    }
    if profile == "mistral4":
        # transformers stacks experts on loading for other classes, and takes this one's as they are.
        experts = stacked_experts(facts, experts)
    width, hidden = SHARED_EXPERTS[profile] * facts.moe_intermediate_size, facts.hidden_size
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    return experts | {
        f"mlp.shared_experts.{name}.weight": torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()
    }


def mistral4_config(config: dict[str, Any], facts: ModelFacts, dims: Sequence[LatentDims]) -> dict[str, Any]:
    """DeepSeek's configuration in the words of `Mistral4ForCausalLM`.

    That class knows plain RoPE as yarn by a factor of 1, whose table is that of `partial_rotary_factor` times
    the width of a query.
    """
    rope, width = dims[0].qk_rope_head_dim, dims[0].qk_nope_head_dim + dims[0].qk_rope_head_dim
    rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": facts.rope_theta,
        "factor": 1.0,
        "original_max_position_embeddings": facts.max_position_embeddings,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        # Queries grow with their position by this, and must not.
        "llama_4_scaling_beta": 0.0,
        # The class takes the integer part of the product, which rounding could bring below P.
        "partial_rotary_factor": rope / width
        if int(width * (rope / width)) == rope
        else (rope + 0.5) / width,
    }
    return config | {
        "architectures": ["Mistral4ForCausalLM"],
        "model_type": "mistral4",
        "rope_parameters": rope_parameters,
    }
