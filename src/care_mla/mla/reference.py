"""The judge of every export: a short float64 forward of the model that the factors define.

Shares no code with the exporters, with our own class or with transformers. Reads the source's tensors and the
factored layers, one layer at a time, in the source's scale and RoPE layout; writes nothing.
"""
# Shapes: B sequences, L positions of the queries, T positions of the keys, D hidden_size, N query heads, G KV
#         heads, n query heads of one KV head (N/G), H head_dim, R kv_lora_rank, M qk_nope_head_dim, P width
#         that is rotated, K query and key width, J rope-key heads, F frequencies (P/2), X heads of the tensor
#         at hand, W rotary_dim, E experts, k experts of a token, I width of an MLP, S vocabulary.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from care_mla.errors import UnsupportedModelError
from care_mla.factors import LatentLayer
from care_mla.facts import ModelFacts
from care_mla.families import block_norms, rotary_frequencies
from care_mla.families.rope import passed_scale, rope_amplitude
from care_mla.plan import REFERENCE_BYTES

if TYPE_CHECKING:
    from care_mla.checkpoint.source import Source

# Rows of the head that are turned to float64 at once.
HEAD_ROWS = 16_384


class Projections(NamedTuple):
    """Rotated queries and keys, and values, per head."""

    q_BNLK: Tensor
    k_BGLK: Tensor
    v_BGLH: Tensor


@dataclass
class Past:
    """Keys and values of the positions before, per layer."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def length(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0


class Greedy(NamedTuple):
    """Tokens chosen one after another, and the logits that each was chosen from."""

    tokens_T: Tensor
    logits_TS: Tensor


class Reference:
    """The converted model, or the original, in float64.

    Args:
        source: of everything but attention.
        layers: gives the factored layer of a 0-based index; None is the original attention.
        device: where it runs.
        num_layers: only so many of the first layers, for models too large to run whole.
        memory_bytes: weights stay in memory between calls if they fit in this; else they are read again.

    Raises:
        UnsupportedModelError: the MLP has another activation than SiLU.
    """

    def __init__(
        self,
        source: Source,
        layers: Callable[[int], LatentLayer] | None,
        device: torch.device | str = "cpu",
        *,
        num_layers: int | None = None,
        memory_bytes: int = REFERENCE_BYTES,
    ) -> None:
        act = source.facts.config.get("hidden_act", "silu")
        if act not in ("silu", "swish"):
            raise UnsupportedModelError(
                f"{source.name}: hidden_act is {act!r}, and the reference forward knows SiLU only. Choose a "
                "model with hidden_act silu."
            )
        self.source = source
        self.facts: ModelFacts = source.facts
        self.layers = layers
        self.device = torch.device(device)
        self.num_layers = source.facts.num_hidden_layers if num_layers is None else num_layers
        values = sum(math.prod(source.shape(name)) for name in source.names())
        self._holds = 8 * values <= memory_bytes
        self._held_layers: dict[int, tuple[dict[str, Tensor], LatentLayer | None]] = {}
        self._held: dict[str, Tensor] = {}

    @torch.no_grad()
    def logits(self, tokens_BL: Tensor) -> Tensor:
        """Logits (B, L, S) of sequences that start at position 0."""
        return self._forward(tokens_BL, None)

    @torch.no_grad()
    def greedy(self, prompt_L: Tensor, steps: int) -> Greedy:
        """Go on from a prompt with the most probable token, `steps` times, end-of-text or not."""
        past = Past([], [])
        tokens, rows = prompt_L[None], []
        for _ in range(steps):
            rows.append(self._forward(tokens, past)[0, -1])
            tokens = rows[-1].argmax().view(1, 1)
        logits_TS = torch.stack(rows)
        return Greedy(logits_TS.argmax(-1), logits_TS)

    def _forward(self, tokens_BL: Tensor, past: Past | None) -> Tensor:
        embed_SD = self._tensor("model.embed_tokens.weight")
        x_BLD = self._wide(embed_SD[tokens_BL.to(embed_SD.device)])
        start = 0 if past is None else past.length
        for layer_idx in range(self.num_layers):
            weights, latent = self._layer(layer_idx)
            attention_norm_D, mlp_norm_D = (weights[f"{name}.weight"] for name in block_norms(self.facts))
            attended_BLD = self._attention(
                weights, latent, self._before(x_BLD, attention_norm_D), start, past, layer_idx
            )
            x_BLD = x_BLD + self._after(attended_BLD, attention_norm_D)
            given_BLD = self._mlp(weights, self._before(x_BLD, mlp_norm_D), layer_idx)
            x_BLD = x_BLD + self._after(given_BLD, mlp_norm_D)
        normed_BLD = self._norm(x_BLD, self._wide(self._tensor("model.norm.weight")))
        tied = self.facts.tie_word_embeddings
        head_SD = self._tensor("model.embed_tokens.weight" if tied else "lm_head.weight")
        return torch.cat([normed_BLD @ self._wide(part).T for part in head_SD.split(HEAD_ROWS)], dim=-1)

    def _wide(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, torch.float64)

    def _tensor(self, name: str) -> Tensor:
        """A tensor outside the layers; in the stored dtype where it is not held."""
        if not self._holds:
            return self.source.tensor(name)
        if name not in self._held:
            self._held[name] = self._wide(self.source.tensor(name))
        return self._held[name]

    def _layer(self, layer_idx: int) -> tuple[dict[str, Tensor], LatentLayer | None]:
        if layer_idx in self._held_layers:
            return self._held_layers[layer_idx]
        weights = {
            # Experts, of which few are used at once, are turned to float64 only then if they are not held.
            name: tensor if ".experts." in name and not self._holds else self._wide(tensor)
            for name, tensor in self.source.layer(layer_idx).items()
        }
        latent = None if self.layers is None else self.layers(layer_idx).to(self.device, torch.float64)
        if self._holds:
            self._held_layers[layer_idx] = weights, latent
        return weights, latent

    def _norm(self, x_BLD: Tensor, weight_D: Tensor) -> Tensor:
        return rms_norm(x_BLD, weight_D, self.facts.rms_norm_eps)

    def _before(self, x_BLD: Tensor, weight_D: Tensor) -> Tensor:
        """What a block is given: the normalised stream, or in a post-norm model the stream itself."""
        return x_BLD if self.facts.is_post_norm else self._norm(x_BLD, weight_D)

    def _after(self, x_BLD: Tensor, weight_D: Tensor) -> Tensor:
        """What a block adds to the stream."""
        return self._norm(x_BLD, weight_D) if self.facts.is_post_norm else x_BLD

    def _mlp(self, weights: dict[str, Tensor], x_BLD: Tensor, layer_idx: int) -> Tensor:
        """The gated MLP, or the chosen experts' outputs weighted by the router."""
        if layer_idx not in self.facts.sparse_layers:
            return gated_mlp(weights, "mlp", x_BLD)
        probs_BLE = (x_BLD @ weights["mlp.gate.weight"].T).softmax(-1)
        top_BLk, chosen_BLk = probs_BLE.topk(self.facts.num_experts_per_tok, dim=-1)
        if self.facts.norm_topk_prob:
            top_BLk = top_BLk / top_BLk.sum(-1, keepdim=True)
        out_BLD = torch.zeros_like(x_BLD)
        for expert_idx in chosen_BLk.unique().tolist():
            prefix = f"mlp.experts.{expert_idx}."
            expert = {name: self._wide(t) for name, t in weights.items() if name.startswith(prefix)}
            is_chosen_BLk = chosen_BLk == expert_idx
            tokens_BL = is_chosen_BLk.any(-1)
            weight_BL = self.facts.routed_scaling_factor * (top_BLk * is_chosen_BLk).sum(-1)
            out_TD = gated_mlp(expert, prefix.removesuffix("."), x_BLD[tokens_BL])
            out_BLD[tokens_BL] += weight_BL[tokens_BL][:, None] * out_TD
        return out_BLD

    def _attention(
        self,
        weights: dict[str, Tensor],
        latent: LatentLayer | None,
        x_BLD: Tensor,
        start: int,
        past: Past | None,
        layer_idx: int,
    ) -> Tensor:
        positions_L = start + torch.arange(x_BLD.shape[1], device=x_BLD.device)
        if latent is None:
            q_BNLK, k_BGTK, v_BGTH = original_projections(self.facts, weights, x_BLD, positions_L)
        else:
            name = "self_attn.o_proj.weight"
            weights = weights | {name: latent.output_weight(weights[name])}
            q_BNLK, k_BGTK, v_BGTH = latent_projections(
                latent, x_BLD, positions_L, eps=self.facts.rms_norm_eps
            )
        if past is not None:
            if layer_idx < len(past.keys):
                k_BGTK = torch.cat((past.keys[layer_idx], k_BGTK), dim=2)
                v_BGTH = torch.cat((past.values[layer_idx], v_BGTH), dim=2)
                past.keys[layer_idx], past.values[layer_idx] = k_BGTK, v_BGTH
            else:
                past.keys.append(k_BGTK)
                past.values.append(v_BGTH)
        per_group = q_BNLK.shape[1] // k_BGTK.shape[1]
        # RoPE's amplitude is on queries and keys alike; of converted ones, the parts without RoPE keep it.
        scaling = rope_amplitude(self.facts) ** 2 / math.sqrt(self.facts.head_dim)
        scores_BGnLT = q_BNLK.unflatten(1, (-1, per_group)) @ k_BGTK[:, :, None].mT * scaling
        back_LT = positions_L[:, None] - torch.arange(k_BGTK.shape[2], device=x_BLD.device)
        hidden_LT = back_LT < 0
        if self.facts.sliding_window is not None:
            hidden_LT |= back_LT >= self.facts.sliding_window
        probs_BGnLT = scores_BGnLT.masked_fill(hidden_LT, -math.inf).softmax(-1)
        out_BNLH = (probs_BGnLT @ v_BGTH[:, :, None]).flatten(1, 2)
        return _linear(weights, "self_attn.o_proj", out_BNLH.transpose(1, 2).flatten(2))


def gated_mlp(weights: dict[str, Tensor], name: str, x_BLD: Tensor) -> Tensor:
    """down(silu(gate x) * up x)."""
    gate_BLI = _linear(weights, f"{name}.gate_proj", x_BLD)
    inner_BLI = gate_BLI * gate_BLI.sigmoid() * _linear(weights, f"{name}.up_proj", x_BLD)
    return _linear(weights, f"{name}.down_proj", inner_BLI)


def original_projections(
    facts: ModelFacts, weights: dict[str, Tensor], x_BLD: Tensor, positions_L: Tensor
) -> Projections:
    """Queries, keys and values of the source's own attention."""

    def heads(name: str) -> Tensor:
        return (
            _linear(weights, f"self_attn.{name}", x_BLD).unflatten(-1, (-1, facts.head_dim)).transpose(1, 2)
        )

    def rotated(name: str) -> Tensor:
        x_BXLH, weight_H = heads(f"{name}_proj"), weights.get(f"self_attn.{name}_norm.weight")
        assert (weight_H is None) == (facts.qk_norm is None), f"{name}_norm of a model with {facts.qk_norm}"
        if weight_H is not None:
            x_BXLH = head_norm(x_BXLH, weight_H, facts.rms_norm_eps)
        turned_BXLW, passed = x_BXLH.tensor_split([facts.rotary_dim], dim=-1)
        turned_BXLW = rotate(turned_BXLW, positions_L, inv_freq_1F)
        return torch.cat((turned_BXLW, passed * passed_scale(facts)), dim=-1)

    inv_freq_1F = torch.tensor([rotary_frequencies(facts)], dtype=torch.float64, device=x_BLD.device)
    return Projections(rotated("q"), rotated("k"), heads("v_proj"))


def latent_projections(latent: LatentLayer, x_BLD: Tensor, positions_L: Tensor, *, eps: float) -> Projections:
    """Queries, keys and values as `LatentLayer` defines them, all rebuilt from what it would cache.

    Args:
        eps: of the norms of queries and keys, where the layer has them.
    """
    inv_freq_JF = latent.inv_freq_JF
    latent_BLR = x_BLD @ latent.down_RD.T
    k_BGLK = _per_head(latent_BLR, latent.up_k_GMR, latent.k_bias_GM)
    v_BGLH = _per_head(latent_BLR, latent.up_v_GHR, latent.v_bias_GH)
    q_rope_BNLP = _per_head(x_BLD, latent.q_rope_NPD, latent.q_rope_bias_NP)
    if latent.q_norm_XH is not None:
        q_rope_BNLP = head_norm(q_rope_BNLP, latent.q_norm_XH.flatten(), eps)
    if latent.k_norm_XH is not None:
        k_BGLK = head_norm(k_BGLK, latent.k_norm_XH.flatten(), eps)
    q_rope_BNLP = rotate(q_rope_BNLP, positions_L, inv_freq_JF)
    if latent.form == "exact-rope":
        return Projections(q_rope_BNLP, rotate(k_BGLK, positions_L, inv_freq_JF), v_BGLH)
    assert latent.k_rope_JPD is not None
    k_rope_BJLP = rotate(_per_head(x_BLD, latent.k_rope_JPD, latent.k_rope_bias_JP), positions_L, inv_freq_JF)
    groups = k_BGLK.shape[1]
    k_rope_BGLP = k_rope_BJLP.repeat_interleave(groups // k_rope_BJLP.shape[1], dim=1)
    k_BGLK = torch.cat((k_BGLK, k_rope_BGLP), dim=-1)
    if latent.q_nope_NMD is None:  # M = 0: all of every key is rotated
        return Projections(q_rope_BNLP, k_BGLK, v_BGLH)
    q_nope_BNLM = _per_head(x_BLD, latent.q_nope_NMD, latent.q_nope_bias_NM)
    return Projections(torch.cat((q_nope_BNLM, q_rope_BNLP), dim=-1), k_BGLK, v_BGLH)


def rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """RMSNorm: x over its root mean square, times the weights."""
    return weight_D * x_BLD / (x_BLD.square().mean(-1, keepdim=True) + eps).sqrt()


def head_norm(x_BXLH: Tensor, weight_O: Tensor, eps: float) -> Tensor:
    """QK-norm: over each head if there are weights for one head, over all at once if there are for all."""
    flat_BLO = x_BXLH.transpose(1, 2).flatten(2).unflatten(-1, (-1, len(weight_O)))
    normed_BLO = rms_norm(flat_BLO, weight_O, eps).flatten(2)
    return normed_BLO.unflatten(-1, (x_BXLH.shape[1], -1)).transpose(1, 2)


def rotate(x_BXLP: Tensor, positions_L: Tensor, inv_freq_JF: Tensor) -> Tensor:
    """Turn half-split pairs (i, i + P/2) by position * inv_freq; each table serves X/J heads in order."""
    inv_freq_XF = inv_freq_JF.repeat_interleave(x_BXLP.shape[1] // len(inv_freq_JF), dim=0)
    angle_XLF = positions_L[:, None] * inv_freq_XF[:, None]
    real_BXLF, imag_BXLF = x_BXLP.chunk(2, dim=-1)
    turned_BXLF = torch.complex(real_BXLF, imag_BXLF) * torch.polar(torch.ones_like(angle_XLF), angle_XLF)
    return torch.cat((turned_BXLF.real, turned_BXLF.imag), dim=-1)


def _per_head(x_BLD: Tensor, weight_XPD: Tensor, bias_XP: Tensor | None) -> Tensor:
    out_BXLP = torch.einsum("bld,xpd->bxlp", x_BLD, weight_XPD)
    return out_BXLP if bias_XP is None else out_BXLP + bias_XP[:, None]


def _linear(weights: dict[str, Tensor], name: str, x_BLD: Tensor) -> Tensor:
    out_BLO = x_BLD @ weights[f"{name}.weight"].T
    bias_O = weights.get(f"{name}.bias")
    return out_BLO if bias_O is None else out_BLO + bias_O
