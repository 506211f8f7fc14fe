"""The converted model in weights that train well, and back: what `care heal` trains and writes.

A folder of a stock profile holds a latent of 1e-7 behind a norm and a rescaled residual stream (export/).
Adam moves every weight by about the learning rate, so it would destroy such weights at its first step. Here
the same model is our own class in the source's scale, with a latent of order one.
"""
# Shapes: D hidden_size, N query heads, G KV heads, H head_dim, R kv_lora_rank, M qk_nope_head_dim,
#         P qk_rope_head_dim, J rope-key heads, C rope values (J*P), O rows of a projection.

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from care_mla.checkpoint.source import EMBEDDING, HEAD
from care_mla.checkpoint.spelling import module_tensors, parts_of
from care_mla.export.converted import ConvertedFolder
from care_mla.export.residual import residual_factor
from care_mla.export.verify import SOURCE_CONFIG
from care_mla.factors import LatentLayer
from care_mla.facts import ModelFacts
from care_mla.families import facts_from_config
from care_mla.heal.lora import add_adapters
from care_mla.mla import configuration
from care_mla.mla.mapping import attention_state_dict, class_names, latent_config, model_class

ATTENTION = "self_attn."
# What a model in training would do at random, and the teacher does not.
NOISE = ("attention_dropout", "resid_pdrop", "embd_pdrop", "router_jitter_noise")


class StudentFolder(ConvertedFolder):
    """A converted folder of any form and ranks, with the weights of our own class in the source's scale.

    The heads of a group may part where the folder has rows of `kv_b_proj` for every query head, as stock
    profiles do: that is what engines compute anyway, costs no cached value, and gives healing more to work
    with. In the profile `care` a KV head keeps its query heads together.
    """

    def _refuse_own(self) -> None:
        """Nothing: what only our own class runs is healed in our own class."""

    def _attention_names(self) -> set[str]:
        names = super()._attention_names()
        if self.is_own and self.config["k_bias"]:
            names.add("k_b_proj.bias")
        if self.is_own and self.config.get("qk_norm") is not None:
            names |= {"q_norm.weight", "k_norm.weight"}
        return names

    @cached_property
    def training_facts(self) -> ModelFacts:
        """The original's facts, and so its norms and its residual stream, with the folder's output bias."""
        original = facts_from_config(json.loads((self.folder / SOURCE_CONFIG).read_text(encoding="utf-8")))
        return replace(original, o_bias=self.facts.o_bias)

    def training_tensor(self, name: str) -> Tensor:
        """A tensor outside attention, or of the output projection, in the source's scale: float32."""
        return (self.tensor(name).double() / self._scale(name)).float()

    def _scale(self, name: str) -> float:
        """What the folder's tensor of this name is, relative to the source's."""
        if self.is_own:
            return 1.0
        # A tied head may have become a tensor of its own, and is still the embedding's.
        name = EMBEDDING if name == HEAD and self.training_facts.tie_word_embeddings else name
        return residual_factor(name, self.training_facts)

    def input_norm(self, layer_idx: int) -> Tensor | None:
        """The weight of the norm before attention, if the model has it there: (D,)."""
        name = f"model.layers.{layer_idx}.input_layernorm.weight"
        return self.training_tensor(name) if name in self.headers else None

    def attention(self, layer_idx: int) -> dict[str, Tensor]:
        """The weights of `LatentAttention` for a layer, named relative to `self_attn`: float32."""
        prefix = f"model.layers.{layer_idx}.self_attn."
        o_weight_DO = self.training_tensor(f"{prefix}o_proj.weight")
        o_bias_D = self.training_tensor(f"{prefix}o_proj.bias") if self.facts.o_bias else None
        if not self.is_own:
            return attention_state_dict(self.latent_layer(layer_idx), o_weight_DO, o_bias_D)
        tensors = {name: tensor.float() for name, tensor in self._attention(layer_idx).items()}
        tensors |= {"o_proj.weight": o_weight_DO}
        return tensors if o_bias_D is None else tensors | {"o_proj.bias": o_bias_D}

    def scaled_attention(self, layer_idx: int) -> dict[str, Tensor]:
        """The same with a latent of order one, as it trains."""
        attention = self.attention(layer_idx)
        scale_latent(attention, self.input_norm(layer_idx))
        return attention

    def student_config(self) -> PreTrainedConfig:
        """The configuration of our own class for this folder, without dropout."""
        if self.is_own:
            config = getattr(configuration, class_names(self.facts)[0]).from_dict(dict(self.config))
        else:
            layers = [self.latent_layer(0)] * self.facts.num_hidden_layers
            config = latent_config(self.training_facts, layers)
        config.use_cache = False
        for name in NOISE:
            if hasattr(config, name):
                setattr(config, name, 0.0)
        return config

    def load_student(self) -> PreTrainedModel:
        """The student on the CPU in float32, every latent of order one."""
        facts = self.training_facts
        model = shape_of_student(facts, self.student_config())
        outside = {
            name: self.training_tensor(name) for name in self.names() if not name.startswith("model.layers.")
        }
        if facts.tie_word_embeddings:
            outside.pop(HEAD, None)
        model.load_state_dict(outside, assign=True, strict=False)
        for layer_idx, layer in enumerate(model.model.layers):
            prefix = f"model.layers.{layer_idx}."
            names = [name for name in self.headers if name.startswith(prefix) and ATTENTION not in name]
            kept = {name.removeprefix(prefix): self.training_tensor(name) for name in names}
            tensors = module_tensors(facts, layer_idx, kept)
            attention = self.scaled_attention(layer_idx)
            tensors |= {ATTENTION + name: tensor for name, tensor in attention.items()}
            layer.load_state_dict(tensors, assign=True)
        model.tie_weights()
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
        left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        assert not left, f"never filled: {left}"
        return model


class HealedFolder(StudentFolder):
    """A converted folder with trained weights in place of its own; what did not train passes to the bit.

    Args:
        folder: the converted folder.
        trained: the weights that trained, by their names in the student, in the source's scale.
    """

    def __init__(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        super().__init__(folder)
        self.untrained = StudentFolder(folder)
        self.trained = dict(trained)
        self.replaced: dict[str, Tensor] = {}
        for name, tensor in self.trained.items():
            if ATTENTION in name and ".o_proj." not in name:
                continue
            # Fused weights are split again, as the writers ask for them.
            for part in parts_of(name, tuple(tensor.shape), self.training_facts):
                self.replaced[part.name] = tensor if part.rows is None else tensor[part.rows]
        if EMBEDDING in self.replaced and HEAD in self.headers and self.training_facts.tie_word_embeddings:
            self.replaced[HEAD] = self.replaced[EMBEDDING]
        unknown = self.replaced.keys() - self.headers.keys()
        assert not unknown, f"trained, and not in {folder}: {sorted(unknown)}"

    @cached_property
    def config_of_student(self) -> PreTrainedConfig:
        """`student_config`, once."""
        return self.untrained.student_config()

    def tensor(self, name: str) -> Tensor:
        if name not in self.replaced:
            return super().tensor(name)
        return self.replaced[name].double() * self._scale(name)

    def latent_layer(self, layer_idx: int) -> LatentLayer:
        prefix = f"model.layers.{layer_idx}.self_attn."
        # What trained takes the place of what is stored, once that has the scale in which it trained.
        original = self.untrained.scaled_attention(layer_idx)
        trained = {name: self.trained[prefix + name] for name in original if prefix + name in self.trained}
        if not trained:
            return super().latent_layer(layer_idx)
        return latent_layer_of(original | trained, self.config_of_student, layer_idx)


def scale_latent(attention: dict[str, Tensor], input_norm_D: Tensor | None) -> None:
    """Bring every latent channel to an rms of about 1, in place; the up-projections make up for it.

    Of an input whose channels are independent and of unit variance behind the norm, that is.
    """
    up_names = [name for name in ("k_b_proj.weight", "v_b_proj.weight") if name in attention]
    rank = attention["v_b_proj.weight"].shape[1]
    kv_a_OD = attention["kv_a_proj_with_mqa.weight"].clone()
    seen_RD = kv_a_OD[:rank] if input_norm_D is None else kv_a_OD[:rank] * input_norm_D.float()
    rms_R = seen_RD.double().square().sum(1).sqrt()
    # A channel of zeros, such as engines' padding, stays as it is.
    rms_R = torch.where(rms_R > 0, rms_R, 1.0).float()
    kv_a_OD[:rank] /= rms_R[:, None]
    attention["kv_a_proj_with_mqa.weight"] = kv_a_OD
    if "kv_a_proj_with_mqa.bias" in attention:
        bias_O = attention["kv_a_proj_with_mqa.bias"].clone()
        bias_O[:rank] /= rms_R
        attention["kv_a_proj_with_mqa.bias"] = bias_O
    for name in up_names:
        attention[name] = attention[name] * rms_R


def latent_layer_of(attention: Mapping[str, Tensor], config: PreTrainedConfig, layer_idx: int) -> LatentLayer:
    """The factored layer that weights of `LatentAttention` are, in float64; undoes `attention_state_dict`.

    A bias on the latent, which training may have moved from zero, is the same for every token: it goes to the
    biases of what is made from the latent, and on keys without RoPE softmax drops it.
    """
    weights = {name: tensor.double() for name, tensor in attention.items()}
    rank, nope = config.kv_lora_rank[layer_idx], config.qk_nope_head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    rope_heads, is_exact = config.num_rope_key_heads, config.latent_form == "exact-rope"
    kv_a_OD, v_b_OR = weights["kv_a_proj_with_mqa.weight"], weights["v_b_proj.weight"]
    k_b_OR = weights.get("k_b_proj.weight", v_b_OR.new_zeros(0, rank))
    q_NKD = weights["q_proj.weight"].unflatten(0, (heads, -1))
    split = 0 if is_exact else nope
    fields: dict[str, Tensor] = {}
    if split:
        fields["q_nope_NMD"] = q_NKD[:, :split]
    if "q_proj.bias" in weights:
        q_bias_NK = weights["q_proj.bias"].unflatten(0, (heads, -1))
        fields["q_rope_bias_NP"] = q_bias_NK[:, split:]
        if split:
            fields["q_nope_bias_NM"] = q_bias_NK[:, :split]
    if rope_heads:
        fields["k_rope_JPD"] = kv_a_OD[rank:].unflatten(0, (rope_heads, -1))
    v_bias_O = weights.get("v_b_proj.bias")
    k_bias_O = weights.get("k_b_proj.bias")
    if "kv_a_proj_with_mqa.bias" in weights:
        bias_O = weights["kv_a_proj_with_mqa.bias"]
        if rope_heads:
            fields["k_rope_bias_JP"] = bias_O[rank:].unflatten(0, (rope_heads, -1))
        if bias_O[:rank].any():
            added_O = v_b_OR @ bias_O[:rank]
            v_bias_O = added_O if v_bias_O is None else v_bias_O + added_O
    if v_bias_O is not None:
        fields["v_bias_GH"] = v_bias_O.unflatten(0, (groups, -1))
    if k_bias_O is not None and is_exact:
        fields["k_bias_GM"] = k_bias_O.unflatten(0, (groups, -1))
    for name in ("q_norm", "k_norm"):
        if f"{name}.weight" in weights:
            width = 1 if config.qk_norm == "head" else (heads if name == "q_norm" else groups)
            fields[f"{name}_XH"] = weights[f"{name}.weight"].unflatten(0, (width, -1))
    return LatentLayer(
        form=config.latent_form,
        down_RD=kv_a_OD[:rank],
        up_k_GMR=k_b_OR.unflatten(0, (groups, -1)) if nope else k_b_OR.view(groups, 0, rank),
        up_v_GHR=v_b_OR.unflatten(0, (groups, -1)),
        q_rope_NPD=q_NKD[:, split:],
        inv_freq_JF=weights["inv_freq"],
        **fields,
    )


def is_trained(name: str, train: str) -> bool:
    """Whether `--train` lets a parameter of the student train; adapters are apart."""
    match train:
        case "all":
            return True
        case "attention+norms":
            return f".{ATTENTION}" in name or "norm." in name
        case "attention":
            return f".{ATTENTION}" in name and "_norm." not in name
        case _:
            return False


def choose_weights(model: PreTrainedModel, train: str, lora_rank: int, seed: int) -> None:
    """Let what `train` names train, and freeze the rest; with `lora`, put adapters on the projections."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, train))
    if train == "lora":
        add_adapters(model, lora_rank, seed)


def shape_of_student(facts: ModelFacts, config: PreTrainedConfig) -> PreTrainedModel:
    """The student without memory for its weights: names and sizes alone."""
    with torch.device("meta"):
        return model_class(facts)(config)
