"""A converted folder as a source again, so that every profile is written from it and never from the original.

Reads what `care convert` wrote: `config.json`, the weights, and `care_reference/source_config.json`. Weights
outside attention are as stored; attention is read back into `LatentLayer`s. Writes nothing.
"""
# Shapes: D hidden_size, N query heads, G KV heads, H head_dim, R kv_lora_rank, M qk_nope_head_dim,
#         P qk_rope_head_dim, F frequencies (P/2), K query width (M+P), X = D + 1 channels of [x ; 1].

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from care_mla.checkpoint.folder import FolderSource
from care_mla.checkpoint.source import TensorHeader
from care_mla.errors import CheckpointError, ExportError
from care_mla.export.deepseek import scaled_queries
from care_mla.export.engine_transformers import OWN_MODEL_TYPE
from care_mla.export.latent_norm import NORM_EPS
from care_mla.export.verify import SOURCE_CONFIG
from care_mla.factors import LatentLayer
from care_mla.facts import ModelFacts
from care_mla.families import facts_from_config, rotary_frequencies, weight_names
from care_mla.families.rope import rope_amplitude
from care_mla.families.rope_table import decoupled_rope, softmax_scale, written_rope
from care_mla.profiles import stock_profile

ATTENTION = ".self_attn."
# The one projection of attention that a conversion leaves alone (but for the scale of the stream).
OUTPUT_PROJECTION = ".self_attn.o_proj."
# Where a class insists on them, they are zeros (experts.py).
SHARED_EXPERTS = ".mlp.shared_experts."


class ConvertedFolder(FolderSource):
    """What `care convert` wrote, as a source whose attention is `latent_layer`.

    `facts` are the original's, but for what the folder itself says: the eps of its norms (its residual stream
    may be scaled), its RoPE, its dtype, and which biases are left.

    Args:
        folder: of the profile deepseek-v3, or of `care` in the decoupled form with one rank for all layers.

    Raises:
        CheckpointError: the folder is no converted model, or lacks what export needs.
        ExportError: its form or its ranks are none that stock engines have.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), folder)

    def _facts(self) -> ModelFacts:
        original = self.folder / SOURCE_CONFIG
        if not original.is_file():
            raise CheckpointError(
                f"{original} is missing, so {self.folder} is no folder of care convert, or one of an older "
                f"version. Nothing was written. Convert the model again: care convert MODEL {self.folder} "
                "--overwrite"
            )
        facts = facts_from_config(json.loads(original.read_text(encoding="utf-8")))
        if self.is_own:
            self._refuse_own()
            biases = {f"{kind}_bias": self.config[f"{kind}_bias"] for kind in ("q", "v", "o")}
            facts = replace(facts, dtype=self.config["dtype"], k_bias=self.config["k_rope_bias"], **biases)
            rope = written_rope(facts, self._stored_table(0).tolist())
            # A table that no stock class has is refused by the export, by its name in the original.
            return facts if rope is None else self._as_written(facts, rope.parameters)
        # Mistral 4's is plain RoPE in other words (experts.py).
        is_plain = self.config["model_type"] == "mistral4"
        written = decoupled_rope(facts, 2, plain=True) if is_plain else self.config["rope_parameters"]
        facts = self._as_written(facts, written)
        if self.config.get("model_type") != stock_type(facts):
            raise ExportError(
                f"{self.folder}: model_type {self.config.get('model_type')!r} was exported already. Nothing "
                "was written. Export from the folder that care convert wrote."
            )
        if self.config["v_head_dim"] != facts.head_dim:
            raise ExportError(
                f"{self.folder}: its values are padded to {self.config['v_head_dim']}, from "
                f"{facts.head_dim}. Nothing was written. Export from the folder without padding."
            )
        has_bias = bool(self.config["attention_bias"])
        return replace(
            facts,
            rms_norm_eps=self.config["rms_norm_eps"],
            tie_word_embeddings=self.config["tie_word_embeddings"],
            q_bias=self.config["q_lora_rank"] is not None,
            k_bias=has_bias,
            v_bias=False,
            o_bias=has_bias,
            routed_scaling_factor=self.config.get("routed_scaling_factor", 1.0),
            dtype=self.config["dtype"],
            config=facts.config | {"rms_norm_eps": self.config["rms_norm_eps"]},
        )

    def _as_written(self, facts: ModelFacts, rope_parameters: dict[str, Any]) -> ModelFacts:
        """Facts whose RoPE is the rope key's, with an amplitude of 1: queries hold that of the layers.

        `facts.config` keeps the original's RoPE, which fits the original's heads alone.
        """
        return replace(
            facts,
            rope_parameters=rope_parameters,
            rope_theta=rope_parameters["rope_theta"],
            rotary_dim=self.config["qk_rope_head_dim"],
        )

    def _stored_table(self, layer_idx: int) -> Tensor:
        """The angles that our own class stores, (F,)."""
        name = f"model.layers.{layer_idx}.self_attn.inv_freq"
        # Where tensors lie follows from the facts, and those from this one.
        path, _ = self._stored[name]
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)[0].double()

    def _refuse_own(self) -> None:
        """Refuse forms and ranks that only our own class has."""
        form, ranks = self.config["latent_form"], self.config["kv_lora_rank"]
        again = "Nothing was written. Convert the model again with"
        if form != "decoupled":
            raise ExportError(
                f"{self.folder} has --form {form}, which only our own class runs: stock engines cache one "
                f"RoPE key for all heads. {again} --form decoupled."
            )
        if len(set(ranks)) > 1:
            raise ExportError(
                f"{self.folder} has ranks per layer ({min(ranks)} to {max(ranks)}), and stock engines read "
                f"one kv_lora_rank. {again} --allocation uniform."
            )

    @property
    def is_own(self) -> bool:
        """Whether the folder is of the profile `care`."""
        return str(self.config.get("model_type", "")).startswith(OWN_MODEL_TYPE)

    @property
    def kv_lora_rank(self) -> int:
        """R, the same in all layers."""
        rank = self.config["kv_lora_rank"]
        return rank[0] if isinstance(rank, list) else rank

    @cached_property
    def headers(self) -> dict[str, TensorHeader]:
        """Tensors outside attention, and the output projection: what passes through."""
        return {
            name: header
            for name, header in super().headers.items()
            if (ATTENTION not in name or OUTPUT_PROJECTION in name) and SHARED_EXPERTS not in name
        }

    def layer(self, layer_idx: int) -> dict[str, Tensor]:
        """Tensors of one layer but for those that `latent_layer` reads."""
        prefix = f"model.layers.{layer_idx}."
        return {name[len(prefix) :]: self.tensor(name) for name in self.headers if name.startswith(prefix)}

    def check(self) -> None:
        """Check, on headers alone, that every tensor is there and no other.

        Raises:
            CheckpointError: naming the tensors.
        """
        expected = {name for name in weight_names(self.facts) if ATTENTION not in name}
        for layer_idx in range(self.facts.num_hidden_layers):
            expected |= {f"model.layers.{layer_idx}.self_attn.{name}" for name in self._attention_names()}
        found = {name for name in self._parts if SHARED_EXPERTS not in name}
        wrong = {"missing": expected - found, "unknown": found - expected - set(self.ignored())}
        for kind, names in wrong.items():
            if names:
                raise CheckpointError(
                    f"{self.folder}: {kind} tensor {min(names)} ({len(names)} in all). It is not what care "
                    f"convert wrote. Convert the model again: care convert MODEL {self.folder} --overwrite"
                )

    def _attention_names(self) -> set[str]:
        config, weights = self.config, {"kv_a_proj_with_mqa", "o_proj"}
        if self.is_own:
            present = {
                "q_proj.bias": config["q_bias"],
                "kv_a_proj_with_mqa.bias": config["k_rope_bias"],
                "v_b_proj.bias": config["v_bias"],
                "o_proj.bias": config["o_bias"],
                "k_b_proj.weight": config["qk_nope_head_dim"] > 0,
                "inv_freq": True,
            }
            weights |= {"q_proj", "v_b_proj"}
        else:
            biases, has_q_lora = config["attention_bias"], config["q_lora_rank"] is not None
            present = {
                "kv_a_proj_with_mqa.bias": biases,
                "o_proj.bias": biases,
                "q_a_proj.bias": biases and has_q_lora,
            }
            weights |= {"kv_a_layernorm", "kv_b_proj"}
            weights |= {"q_a_proj", "q_a_layernorm", "q_b_proj"} if has_q_lora else {"q_proj"}
        return {f"{name}.weight" for name in weights} | {name for name, there in present.items() if there}

    def _attention(self, layer_idx: int) -> dict[str, Tensor]:
        """Every tensor of a layer's attention in float64, relative to `self_attn.`."""
        prefix = f"model.layers.{layer_idx}.self_attn."
        names = self._attention_names() - {"o_proj.weight", "o_proj.bias"}
        return {name: self._read(prefix + name).double() for name in names}

    def latent_layer(self, layer_idx: int) -> LatentLayer:
        """The factored layer that the stored weights are, in float64; of the 0-based index.

        Stock classes expand the latent per query head, and healing may tell the heads of a group apart: so
        G is N here.
        """
        weights = self._attention(layer_idx)
        layer = self._own_layer(weights) if self.is_own else self._stock_layer(weights, layer_idx)
        return scaled_queries(layer, self._logit_scale)

    @cached_property
    def _logit_scale(self) -> float:
        """What the folder's class multiplies logits by beside 1/sqrt(H), as amplitude or in the softmax."""
        if not self.is_own:
            return softmax_scale(self.facts.rope_parameters)
        original = facts_from_config(json.loads((self.folder / SOURCE_CONFIG).read_text(encoding="utf-8")))
        return (rope_amplitude(original) / rope_amplitude(self.facts)) ** 2

    def frequencies(self, layer_idx: int) -> Tensor:
        """The angles per position of a layer's rope key, (F,), without reading its weights."""
        if self.is_own:
            return self._stored_table(layer_idx)
        return torch.tensor(rotary_frequencies(self.facts), dtype=torch.float64)

    def _own_layer(self, weights: dict[str, Tensor]) -> LatentLayer:
        facts, rank, rope = self.facts, self.kv_lora_rank, self.config["qk_rope_head_dim"]
        q_NKD = weights["q_proj.weight"].unflatten(0, (facts.num_attention_heads, -1))
        nope = q_NKD.shape[1] - rope
        up_v_GHR = weights["v_b_proj.weight"].unflatten(0, (-1, facts.head_dim))
        up_k_GR = weights.get("k_b_proj.weight", up_v_GHR.new_zeros(0, rank))
        biases: dict[str, Tensor] = {}
        if "q_proj.bias" in weights:
            q_NK = weights["q_proj.bias"].unflatten(0, (facts.num_attention_heads, -1))
            biases = {"q_rope_bias_NP": q_NK[:, nope:]} | ({"q_nope_bias_NM": q_NK[:, :nope]} if nope else {})
        if "kv_a_proj_with_mqa.bias" in weights:
            biases["k_rope_bias_JP"] = weights["kv_a_proj_with_mqa.bias"][None, rank:]
        if "v_b_proj.bias" in weights:
            biases["v_bias_GH"] = weights["v_b_proj.bias"].unflatten(0, (-1, facts.head_dim))
        return LatentLayer(
            form="decoupled",
            down_RD=weights["kv_a_proj_with_mqa.weight"][:rank],
            up_k_GMR=up_k_GR.unflatten(0, (len(up_v_GHR), nope)),
            up_v_GHR=up_v_GHR,
            q_rope_NPD=q_NKD[:, nope:],
            inv_freq_JF=weights["inv_freq"],
            q_nope_NMD=q_NKD[:, :nope] if nope else None,
            k_rope_JPD=weights["kv_a_proj_with_mqa.weight"][None, rank:],
            **biases,
        )

    def _stock_layer(self, weights: dict[str, Tensor], layer_idx: int) -> LatentLayer:
        """Undo what deepseek.py does: the linear norms, the order of RoPE's pairs, the scale of queries.

        The scale of the latent's down-projection is left as it is and its inverse goes to the
        up-projections, so that an export in the same profile finds the scale that is there.
        """
        facts, rank = self.facts, self.kv_lora_rank
        rope, nope = self.config["qk_rope_head_dim"], self.config["qk_nope_head_dim"]
        kv_a_XD = weights["kv_a_proj_with_mqa.weight"]
        up_NXR = weights["kv_b_proj.weight"].unflatten(0, (facts.num_attention_heads, -1))
        up_NXR = up_NXR * (weights["kv_a_layernorm.weight"] / math.sqrt(NORM_EPS))
        q_NKX = self._queries(weights) / math.sqrt((nope + rope) / facts.head_dim)
        q_rope_NPX = half_split_pairs(q_NKX[:, nope:], dim=1)
        hidden = facts.hidden_size
        biases: dict[str, Tensor] = {}
        if q_NKX.shape[2] > hidden:
            biases = {"q_rope_bias_NP": q_rope_NPX[..., hidden]}
            biases |= {"q_nope_bias_NM": q_NKX[:, :nope, hidden]} if nope else {}
        if "kv_a_proj_with_mqa.bias" in weights:
            k_bias_P = weights["kv_a_proj_with_mqa.bias"][rank:]
            biases["k_rope_bias_JP"] = half_split_pairs(k_bias_P, dim=0)[None]
        return LatentLayer(
            form="decoupled",
            down_RD=kv_a_XD[:rank],
            up_k_GMR=up_NXR[:, :nope],
            up_v_GHR=up_NXR[:, nope:],
            q_rope_NPD=q_rope_NPX[..., :hidden],
            inv_freq_JF=self.frequencies(layer_idx)[None],
            q_nope_NMD=q_NKX[:, :nope, :hidden] if nope else None,
            k_rope_JPD=half_split_pairs(kv_a_XD[rank:], dim=0)[None],
            **biases,
        )

    def _queries(self, weights: dict[str, Tensor]) -> Tensor:
        """Rows of every head on x, or on [x ; 1] where queries have a bias: (N, K, D) or (N, K, X)."""
        heads = self.facts.num_attention_heads
        if "q_proj.weight" in weights:
            return weights["q_proj.weight"].unflatten(0, (heads, -1))
        scale_X = weights["q_a_layernorm.weight"] / math.sqrt(NORM_EPS)
        q_a_XX = torch.cat((weights["q_a_proj.weight"], weights["q_a_proj.bias"][:, None]), dim=1)
        q_OX = weights["q_b_proj.weight"] * scale_X
        diagonal_X = q_a_XX.diagonal()
        # As written it is a scaled identity; training may have made it another matrix.
        is_diagonal = q_a_XX.count_nonzero() == diagonal_X.count_nonzero()
        q_OX = q_OX * diagonal_X if is_diagonal else q_OX @ q_a_XX
        return q_OX.unflatten(0, (heads, -1))


def stock_type(facts: ModelFacts) -> str:
    """The `model_type` of the stock profile that `care convert` writes for this source."""
    profile, _ = stock_profile(facts)
    return "" if profile is None else profile.replace("-", "_")


def half_split_pairs(rows: Tensor, dim: int) -> Tensor:
    """DeepSeek's RoPE pairs (2i, 2i + 1) along `dim`, reordered to (i, i + P/2)."""
    return rows.unflatten(dim, (-1, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)
