"""Configurations of our own latent-attention classes: the source's, and what the latent form adds.

Copied as it is into every checkpoint of the `care` profile, as remote code: it imports nothing but
transformers. Reads and writes `config.json`.
"""
# Shapes: D hidden_size, G KV heads, H head_dim, R kv_lora_rank, M qk_nope_head_dim, P qk_rope_head_dim,
#         J rope-key heads.

from __future__ import annotations

from transformers import (
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

LATENT_FORMS = ("exact-rope", "decoupled", "partial-rope")


class LatentFields(PreTrainedConfig):
    """What the latent forms add to a stock configuration.

    Args:
        latent_form: `exact-rope` (keys are rebuilt from the latent and then rotated), `decoupled` (one
            rope key for all heads) or `partial-rope` (a rope key for each KV head).
        kv_lora_rank: R of each layer; one number means the same in all.
        qk_nope_head_dim: M, width of the key that is rebuilt from the latent; H in the exact-rope form.
        qk_rope_head_dim: P, width of a cached rope key; 0 in the exact-rope form.
        num_rope_key_heads: J, cached rope keys per token: 0 in the exact-rope form, 1 or G in the others.
        q_bias: whether `q_proj` has a bias; likewise `k_rope_bias` for `kv_a_proj_with_mqa` (zero on the
            latent), `k_bias` for `k_b_proj`, `v_bias` for `v_b_proj` and `o_bias` for `o_proj`.
        qk_norm: in the exact-rope form, whether queries and rebuilt keys are normalised before RoPE: `head`
            (each head by itself), `full` (all heads at once) or None.
    """

    latent_form: str = "exact-rope"
    kv_lora_rank: int | list[int] = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 0
    num_rope_key_heads: int = 0
    q_bias: bool = False
    k_rope_bias: bool = False
    k_bias: bool = False
    v_bias: bool = False
    o_bias: bool = False
    qk_norm: str | None = None

    # The stock plans shard k_proj and v_proj, which are not there; a latent is shared by all heads.
    base_model_tp_plan = None

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        if isinstance(self.kv_lora_rank, int):
            self.kv_lora_rank = [self.kv_lora_rank] * self.num_hidden_layers
        if self.latent_form not in LATENT_FORMS:
            raise ValueError(
                f"config.json: latent_form is {self.latent_form!r}, which this code cannot run. "
                f"Use one of {', '.join(LATENT_FORMS)}, or load the checkpoint with the code that wrote it."
            )
        if len(self.kv_lora_rank) != self.num_hidden_layers:
            raise ValueError(
                f"config.json: kv_lora_rank lists {len(self.kv_lora_rank)} ranks for "
                f"{self.num_hidden_layers} layers, and each layer needs its own. Give one number for all, or "
                "one for each layer."
            )

    @property
    def qk_head_dim(self) -> int:
        """M + P. Its presence keeps `generate` from preallocating a cache for G heads of width H."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


class LatentLlamaConfig(LatentFields, LlamaConfig):
    """Llama with latent attention."""

    model_type = "care_latent_llama"


class LatentMistralConfig(LatentFields, MistralConfig):
    """Mistral with latent attention."""

    model_type = "care_latent_mistral"


class LatentMixtralConfig(LatentFields, MixtralConfig):
    """Mixtral with latent attention."""

    model_type = "care_latent_mixtral"


class LatentPhi3Config(LatentFields, Phi3Config):
    """Phi-3 with latent attention."""

    model_type = "care_latent_phi3"


class LatentQwen2Config(LatentFields, Qwen2Config):
    """Qwen2 with latent attention."""

    model_type = "care_latent_qwen2"


class LatentQwen3Config(LatentFields, Qwen3Config):
    """Qwen3 with latent attention."""

    model_type = "care_latent_qwen3"


class LatentOlmo2Config(LatentFields, Olmo2Config):
    """OLMo 2 with latent attention."""

    model_type = "care_latent_olmo2"


class LatentQwen3MoeConfig(LatentFields, Qwen3MoeConfig):
    """Qwen3-MoE with latent attention."""

    model_type = "care_latent_qwen3_moe"
