"""Latent attention for transformers: every form, with a rank of its own for each layer.

`LatentAttention` takes the place of `self_attn` in the source's own decoder layer (modeling.py). Copied as it
is into every checkpoint of the `care` profile, as remote code: it imports nothing but torch and transformers.
"""
# Shapes: B batch, L positions of the queries, S positions of the keys, D hidden_size, N query heads,
#         G KV heads, n query heads of one KV head (N/G), H head_dim, R kv_lora_rank, M qk_nope_head_dim,
#         P qk_rope_head_dim, J rope-key heads, F frequencies (P/2), K query and key width (M+P),
#         C cached rope values (J*P), X heads of the tensor at hand, O columns of a projection.

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward


def rope_attention_scaling(config: PreTrainedConfig) -> float:
    """The factor that the source's RoPE puts on cos and sin: 1 for `default`, `linear` and `llama3`."""
    rope_type = config.rope_parameters.get("rope_type", "default")
    return 1.0 if rope_type == "default" else float(ROPE_INIT_FUNCTIONS[rope_type](config)[1])


def rotate(x_BXLP: Tensor, positions_BL: Tensor, inv_freq_JF: Tensor) -> Tensor:
    """Turn half-split pairs (i, i + P/2) by position * inv_freq; each table serves X/J heads in order."""
    # Angles in float32: in bfloat16 they would be wrong by whole turns.
    angles_BJ1LF = positions_BL[:, None, None, :, None].float() * inv_freq_JF[:, None, None, :]
    cos_BJ1LF, sin_BJ1LF = angles_BJ1LF.cos().to(x_BXLP.dtype), angles_BJ1LF.sin().to(x_BXLP.dtype)
    first, second = x_BXLP.unflatten(1, (inv_freq_JF.shape[0], -1)).chunk(2, dim=-1)
    turned = torch.cat(
        (first * cos_BJ1LF - second * sin_BJ1LF, second * cos_BJ1LF + first * sin_BJ1LF), dim=-1
    )
    return turned.flatten(1, 2)


def normed(x_BLO: Tensor, norm: nn.RMSNorm | None) -> Tensor:
    """The heads of a projection, side by side, through QK-norm: over as many of them as it is wide."""
    if norm is None:
        return x_BLO
    return norm(x_BLO.unflatten(-1, (-1, norm.normalized_shape[0]))).flatten(-2)


class LatentAttention(nn.Module):
    """Attention that caches a latent, and rope keys where the form has them, in place of keys and values.

    One `cache.update` per call stores the latent (B, 1, L, R) as "keys" and the rotated rope keys
    (B, 1, L, J*P) as "values", which are zero wide in the exact-rope form.

    - exact-rope: key = rope(k_norm(k_b_proj latent)), query = rope(q_norm(q_proj x)), the norms where the
      source has them. All keys are rebuilt from the cache at each call and rotated at
      their own positions: those of this call's `position_ids`, and before them the positions that lead up to
      the first. Left padding is therefore exact; going on from a cache whose rows end in padding is not.
    - decoupled (J = 1), partial-rope (J = G): key = [k_b_proj latent ; rope key]. A single query over a cache
      is absorbed: scored against the latent itself, so that neither keys nor values are rebuilt.

    Values are v_b_proj latent. The softmax scale is 1/sqrt(H), times the square of RoPE's own scaling.

    Args:
        config: a configuration with `LatentFields`.
        layer_idx: 0-based.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.num_heads
        self.kv_lora_rank = config.kv_lora_rank[layer_idx]
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.num_rope_key_heads = config.num_rope_key_heads
        self.rotates_rebuilt_keys = config.latent_form == "exact-rope"
        self.scaling = self.head_dim**-0.5 * rope_attention_scaling(config) ** 2
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        layer_types = getattr(config, "layer_types", None)
        is_sliding = layer_types is None or layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = getattr(config, "sliding_window", None) if is_sliding else None

        hidden_size, rank = config.hidden_size, self.kv_lora_rank
        rope_width = self.num_rope_key_heads * self.qk_rope_head_dim
        qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.q_proj = nn.Linear(hidden_size, self.num_heads * qk_head_dim, bias=config.q_bias)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, rank + rope_width, bias=config.k_rope_bias)
        self.k_b_proj = None
        if self.qk_nope_head_dim > 0:
            self.k_b_proj = nn.Linear(rank, self.num_kv_heads * self.qk_nope_head_dim, bias=config.k_bias)
        self.v_b_proj = nn.Linear(rank, self.num_kv_heads * self.head_dim, bias=config.v_bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden_size, bias=config.o_bias)
        self.q_norm, self.k_norm = None, None
        if config.qk_norm is not None:
            is_full = config.qk_norm == "full"
            widths = [
                (heads if is_full else 1) * self.head_dim for heads in (self.num_heads, self.num_kv_heads)
            ]
            self.q_norm, self.k_norm = (nn.RMSNorm(width, eps=config.rms_norm_eps) for width in widths)
        # Persistent: layers and heads may keep different frequencies, which no configuration could name.
        frequencies = (self.qk_rope_head_dim or self.head_dim) // 2
        inv_freq_JF = torch.zeros(max(self.num_rope_key_heads, 1), frequencies, dtype=torch.float32)
        self.register_buffer("inv_freq", inv_freq_JF)

    def _apply(self, fn, recurse: bool = True) -> LatentAttention:
        # `model.to(torch.bfloat16)` must not round the frequencies.
        inv_freq_JF = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:
            self.inv_freq = inv_freq_JF.to(self.inv_freq.device)
        return self

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, and return the output (B, L, D) and the attention probabilities if the backend gives them.

        Args:
            hidden_states: (B, L, D).
            position_embeddings: not used: the frequencies here may differ from the source's.
            attention_mask: as the source's model class makes it for its attention backend.
            position_ids: (B or 1, L); without them, positions count on from the cache's length.
            cache: what newer transformers pass.
            past_key_values: the same under its older name.
            **kwargs: passed on to the attention backend.
        """
        batch, length, _ = hidden_states.shape
        cache = past_key_values if cache is None else cache
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length(self.layer_idx)
            position_ids = torch.arange(length, device=hidden_states.device)[None] + past
        q_BNLK, latent_BLR, k_rope_BLC = self._project(hidden_states, position_ids)
        key_positions_BS, latent_BSR, k_rope_BSC = position_ids, latent_BLR, k_rope_BLC
        if cache is not None:
            # Before the update, which changes the counters that this reads.
            key_positions_BS = self._key_positions(position_ids, cache)
            latent_B1SR, k_rope_B1SC = cache.update(latent_BLR[:, None], k_rope_BLC[:, None], self.layer_idx)
            latent_BSR, k_rope_BSC = latent_B1SR[:, 0], k_rope_B1SC[:, 0]

        if cache is not None and length == 1 and self._can_absorb(latent_BSR):
            out_BLO, weights = self._absorbed(q_BNLK[:, :, 0], latent_BSR, k_rope_BSC, attention_mask)
        else:
            key_BGSK = self._keys(latent_BSR, k_rope_BSC, key_positions_BS)
            value_BGSH = self._kv_heads(self.v_b_proj(latent_BSR))
            # Fused kernels want values as wide as keys: three times as fast on a CPU; what is added is zero.
            missing = max(0, key_BGSK.shape[-1] - self.head_dim)
            value_BGSK = nn.functional.pad(value_BGSH, (0, missing))
            # Unset where a stock model holds this module; sdpa reads the mask of every backend.
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation or "sdpa", eager_attention_forward
            )
            out_BLNH, weights = attend(
                self,
                q_BNLK,
                key_BGSK,
                value_BGSK,
                attention_mask,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                sliding_window=self.sliding_window,
                **kwargs,
            )
            out_BLO = out_BLNH[..., : self.head_dim].reshape(batch, length, -1)
        return self.o_proj(out_BLO), weights

    def _project(self, x_BLD: Tensor, positions_BL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, N, L, K), the latent (B, L, R) and rotated rope keys (B, L, C)."""
        q_BLO = normed(self.q_proj(x_BLD), self.q_norm)
        q_BNLK = q_BLO.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        rope_width = self.num_rope_key_heads * self.qk_rope_head_dim
        compressed = self.kv_a_proj_with_mqa(x_BLD)
        latent_BLR, k_rope_BLC = compressed.split((self.kv_lora_rank, rope_width), dim=-1)
        if self.rotates_rebuilt_keys:
            return rotate(q_BNLK, positions_BL, self.inv_freq), latent_BLR, k_rope_BLC
        q_nope, q_rope = q_BNLK.split((self.qk_nope_head_dim, self.qk_rope_head_dim), dim=-1)
        q_BNLK = torch.cat((q_nope, rotate(q_rope, positions_BL, self.inv_freq)), dim=-1)
        k_rope_BJLP = rotate(self._rope_heads(k_rope_BLC), positions_BL, self.inv_freq)
        return q_BNLK, latent_BLR, k_rope_BJLP.transpose(1, 2).flatten(2)

    def _kv_heads(self, x_BSO: Tensor) -> Tensor:
        return x_BSO.unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)

    def _rope_heads(self, k_rope_BSC: Tensor) -> Tensor:
        return k_rope_BSC.unflatten(-1, (self.num_rope_key_heads, -1)).transpose(1, 2)

    def _key_positions(self, position_ids: Tensor, cache: Cache) -> Tensor:
        """Position of each key that `cache.update` will return, for windows and static caches too: (B, S)."""
        length = position_ids.shape[-1]
        total, offset = cache.get_mask_sizes(length, self.layer_idx)
        # Counted from the first query: 0 to L-1 are the queries themselves, what is cached lies below.
        slots_S = torch.arange(total, device=position_ids.device) + offset
        slots_S = slots_S - cache.get_seq_length(self.layer_idx)
        return position_ids[:, slots_S.clamp(0, length - 1)] + slots_S.clamp(max=0)

    def _keys(self, latent_BSR: Tensor, k_rope_BSC: Tensor, positions_BS: Tensor) -> Tensor:
        """Keys of all KV heads, rebuilt from what is cached: (B, G, S, M+P)."""
        parts = []
        if self.k_b_proj is not None:
            parts.append(self._kv_heads(normed(self.k_b_proj(latent_BSR), self.k_norm)))
        if self.rotates_rebuilt_keys:
            return rotate(parts[0], positions_BS, self.inv_freq)
        k_rope_BJSP = self._rope_heads(k_rope_BSC)
        parts.append(k_rope_BJSP.expand(-1, self.num_kv_heads, -1, -1))
        return torch.cat(parts, dim=-1)

    def _can_absorb(self, latent_BSR: Tensor) -> bool:
        """Whether the up-projections may be used by their weights: not if adapted, quantised or offloaded."""
        return (
            not self.rotates_rebuilt_keys
            and not self.training
            and all(
                type(module) is nn.Linear and module.weight.device == latent_BSR.device
                for module in (self.k_b_proj, self.v_b_proj)
            )
        )

    def _absorbed(
        self, q_BNK: Tensor, latent_BSR: Tensor, k_rope_BSC: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Score one query per row against the latents, and map their mean up: (B, 1, N*H) and weights."""
        assert self.k_b_proj is not None
        heads, rope_heads = (self.num_kv_heads, -1), (self.num_rope_key_heads, -1)
        q_nope_BNM, q_rope_BNP = q_BNK.split((self.qk_nope_head_dim, self.qk_rope_head_dim), dim=-1)
        up_k_GMR = self.k_b_proj.weight.unflatten(0, heads)
        q_latent_BNR = torch.einsum("bgnm,gmr->bgnr", q_nope_BNM.unflatten(1, heads), up_k_GMR).flatten(1, 2)
        k_rope_BJPS = self._rope_heads(k_rope_BSC).transpose(-1, -2)
        scores_BNS = q_latent_BNR @ latent_BSR.transpose(-1, -2)
        scores_BNS = scores_BNS + (q_rope_BNP.unflatten(1, rope_heads) @ k_rope_BJPS).flatten(1, 2)
        scores_BNS = scores_BNS * self.scaling
        if mask is not None and mask.dtype == torch.bool:
            scores_BNS = scores_BNS.masked_fill(~mask[:, :, 0], torch.finfo(scores_BNS.dtype).min)
        elif mask is not None:
            scores_BNS = scores_BNS + mask[:, :, 0]
        weights_BNS = scores_BNS.softmax(dim=-1, dtype=torch.float32).to(q_BNK.dtype)
        mean_BGnR = (weights_BNS @ latent_BSR).unflatten(1, heads)
        out_BGnH = torch.einsum("bgnr,ghr->bgnh", mean_BGnR, self.v_b_proj.weight.unflatten(0, heads))
        if self.v_b_proj.bias is not None:
            out_BGnH = out_BGnH + self.v_b_proj.bias.view(self.num_kv_heads, 1, self.head_dim)
        return out_BGnH.flatten(1)[:, None], weights_BNS[:, :, None]
