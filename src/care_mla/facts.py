"""The numbers of a source model that every step needs, from its configuration alone: no weights, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

# RMSNorm of queries and keys before RoPE: over each head by itself (Qwen3), or over all heads (OLMo 2).
QkNorm = Literal["head", "full"]


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Dimensions and switches of a decoder, under the names that its `config.json` gives them.

    `config` is the complete configuration as transformers spells it, so that the stock classes can be built
    from it. RoPE turns the first `rotary_dim` dimensions of a head, half-split among themselves, and passes
    the others. The layers in `sparse_layers` have `num_experts` MLPs of width `moe_intermediate_size` in
    place of one of width `intermediate_size`: of a softmax over the router's logits the `num_experts_per_tok`
    largest count, divided by their sum where `norm_topk_prob` says so, times `routed_scaling_factor`.
    from it. `qk_norm` tells how queries and keys are normalised before RoPE; in a model with `is_post_norm`
    the norms of a layer come after its attention and its MLP, before what they give is added to the stream.
    """

    family: str
    architecture: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_parameters: dict[str, Any]
    tie_word_embeddings: bool
    q_bias: bool = False
    k_bias: bool = False
    v_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    rotary_dim: int
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    sparse_layers: frozenset[int] = frozenset()
    qk_norm: QkNorm | None = None
    is_post_norm: bool = False
    dtype: str = "float32"
    config: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def num_key_value_groups(self) -> int:
        """Query heads that share one KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def cached_values(self) -> int:
        """Cached values per token per layer of the source model: keys and values of every KV head."""
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def rope_type(self) -> str:
        """Which scaling RoPE has: `default`, `llama3`, `yarn` or another."""
        return self.rope_parameters.get("rope_type", "default")
