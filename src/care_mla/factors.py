"""The converted attention of one layer, in the source model's own scale and RoPE layout.

Every method of every form ends here, and everything downstream (reference forward, our own class, the
exporters) starts here. Written to `layers/layer_00.safetensors` in the work folder.
"""
# Shapes: D hidden_size, N query heads, G KV heads, H head_dim, R kv_lora_rank, M qk_nope_head_dim,
#         P qk_rope_head_dim, J rope-key heads (0, 1 or G), F frequencies (P/2), X rows of a norm (1, or one
#         for each head), O columns of o_proj (N*H).

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_args

import torch
from safetensors import safe_open
from torch import Tensor

from care_mla.configs import Form
from care_mla.workspace import save_tensors

FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True, kw_only=True)
class LatentLayer:
    """One layer's latent attention; the softmax scale stays the source's, 1/sqrt(H) and RoPE's own scaling.

    All forms cache `latent = down x` (R values) and, where J > 0, the rotated `k_rope x` (J * P values) per
    token. Values are `up_v latent + v_bias`.

    - exact-rope (J = 0): key = rope(up_k latent + k_bias), query = rope(q_rope x + q_rope_bias); M = P = H.
    - decoupled (J = 1) and partial-rope (J = G): key = [up_k latent ; rope(k_rope x + k_rope_bias)],
      query = [q_nope x + q_nope_bias ; rope(q_rope x + q_rope_bias)]; there k_bias is None, since softmax
      drops what is the same for every key.

    Where `q_norm_XH` and `k_norm_XH` are present (exact-rope alone), queries and rebuilt keys pass through an
    RMSNorm with these weights and the source's eps before RoPE: over each head by itself if X is 1, else over
    all heads at once, with a row of weights for each.

    `o_weight_DO` is the output projection where training has changed it; None is the source's.

    RoPE pairs are half-split (i, i + P/2) and pair i of rope-key head j turns by `inv_freq_JF[j, i]` per
    position.
    """

    form: Form
    down_RD: Tensor
    up_k_GMR: Tensor
    up_v_GHR: Tensor
    q_rope_NPD: Tensor
    inv_freq_JF: Tensor
    q_nope_NMD: Tensor | None = None
    k_rope_JPD: Tensor | None = None
    q_rope_bias_NP: Tensor | None = None
    q_nope_bias_NM: Tensor | None = None
    k_rope_bias_JP: Tensor | None = None
    k_bias_GM: Tensor | None = None
    v_bias_GH: Tensor | None = None
    q_norm_XH: Tensor | None = None
    k_norm_XH: Tensor | None = None
    o_weight_DO: Tensor | None = None

    @property
    def kv_lora_rank(self) -> int:
        """Width R of the latent."""
        return self.down_RD.shape[0]

    @property
    def qk_rope_head_dim(self) -> int:
        """Width P of one rope key; 0 in the exact-rope form, where keys are rebuilt and then rotated."""
        return 0 if self.k_rope_JPD is None else self.k_rope_JPD.shape[1]

    @property
    def cached_values(self) -> int:
        """Cached values per token: R + J * P."""
        rope = 0 if self.k_rope_JPD is None else self.k_rope_JPD.shape[0] * self.k_rope_JPD.shape[1]
        return self.kv_lora_rank + rope

    def with_heads_apart(self) -> LatentLayer:
        """The same attention with up-projections for every query head, as stock classes have them: G is N.

        It caches what it did. Decoupled layers alone: they have no norm and no bias of rebuilt keys.
        """
        assert self.form == "decoupled"
        per_group = len(self.q_rope_NPD) // len(self.up_v_GHR)
        return replace(
            self,
            up_k_GMR=self.up_k_GMR.repeat_interleave(per_group, dim=0),
            up_v_GHR=self.up_v_GHR.repeat_interleave(per_group, dim=0),
            v_bias_GH=None if self.v_bias_GH is None else self.v_bias_GH.repeat_interleave(per_group, dim=0),
        )

    def output_weight(self, source_DO: Tensor) -> Tensor:
        """The output projection: this layer's own if it has one, else the source's."""
        return source_DO if self.o_weight_DO is None else self.o_weight_DO

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LatentLayer:
        """The same layer on another device or in another dtype."""
        return replace(self, **{name: t.to(device=device, dtype=dtype) for name, t in self.tensors().items()})

    def save(self, path: Path) -> None:
        """Write the layer to one safetensors file, atomically."""
        save_tensors(path, self.tensors(), metadata={"form": self.form})

    @classmethod
    def load(cls, path: Path) -> LatentLayer:
        """Read a layer that `save` wrote."""
        with safe_open(path, "pt") as file:
            form = file.metadata()["form"]
            return cls(form=form, **{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
