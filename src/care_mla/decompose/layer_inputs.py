"""What every factorisation method starts from, and what it returns."""
# Shapes: D hidden_size, N query heads, G KV heads, H head_dim, F frequencies (H/2), O = 2*G*H rows [keys;
#         values].

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from care_mla.calibrate.statistics import LayerSums, RotationSums
from care_mla.factors import LatentLayer
from care_mla.families.rope_table import unscaled
from care_mla.workspace import Workspace, layer_file

if TYPE_CHECKING:
    from care_mla.checkpoint.source import Source

# Below this many tokens the Fisher information is noisy and needs more damping.
FISHER_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """One layer's projections and what calibration saw there, all in float64 on one device.

    Moments are means over calibration tokens: `c_DD` = E[x x^T] (uncentred, undamped), `mean_D` = E[x],
    `mean_abs_D` = E|x|; `felt_c_DD` is E[x x^T] with tokens weighted by the squared gradients at their keys
    and values, the mean of both after scaling each to the trace of `c_DD`. `q_energy_NF` = E|q_h,f|^2 of the
    query before RoPE, as complex pairs (f, f + F). `gamma_NF` (complex) is the mean rotation that each head
    sees. The Fisher matrices are means of g g^T over tokens, with g the gradient at [keys of all KV heads;
    values of all KV heads]: `fisher_exact_OO` at the key before RoPE, `fisher_nope_OO` at the key that has
    lost RoPE (see decompose/fisher.py). `inv_freq_F` are the source's angles per position; those in
    `unscaled_F` are theta^(-f/F) with theta `rope_theta`, as in plain RoPE.
    """

    layer_idx: int
    w_q_NHD: Tensor
    w_k_GHD: Tensor
    w_v_GHD: Tensor
    b_q_NH: Tensor | None
    b_k_GH: Tensor | None
    b_v_GH: Tensor | None
    c_DD: Tensor
    felt_c_DD: Tensor
    mean_D: Tensor
    mean_abs_D: Tensor
    q_energy_NF: Tensor
    gamma_NF: Tensor
    fisher_exact_OO: Tensor
    fisher_nope_OO: Tensor
    inv_freq_F: Tensor
    unscaled_F: Tensor
    rope_theta: float
    damping: float
    fisher_damping: float

    @property
    def num_kv_heads(self) -> int:
        return self.w_k_GHD.shape[0]

    @property
    def num_heads(self) -> int:
        return self.w_q_NHD.shape[0]

    @property
    def head_dim(self) -> int:
        return self.w_k_GHD.shape[1]

    @property
    def damped_c_DD(self) -> Tensor:
        """C + damping * mean(diag C) * I: every method uses this one, so that they differ in nothing else."""
        return damp(self.c_DD, self.damping)

    def key_moment(self) -> Tensor:
        """E[k k^T] of the keys before RoPE over all KV heads, bias included: (G*H, G*H)."""
        w_OD = self.w_k_GHD.flatten(0, 1)
        moment_OO = w_OD @ self.c_DD @ w_OD.T
        if self.b_k_GH is None:
            return moment_OO
        b_O = self.b_k_GH.flatten()
        cross_OO = torch.outer(w_OD @ self.mean_D, b_O)
        return moment_OO + cross_OO + cross_OO.T + torch.outer(b_O, b_O)


def damp(c_DD: Tensor, damping: float) -> Tensor:
    """C + damping * mean(diag C) * I."""
    return c_DD + damping * c_DD.diagonal().mean() * torch.eye(
        len(c_DD), dtype=c_DD.dtype, device=c_DD.device
    )


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """One layer factored by one method, for every rank at once.

    `spectra` holds, for each latent that is cut separately (one for a joint latent, two for keys and values),
    the loss that dropping each component adds: sums of its tail predict the loss at a rank. `cut(ranks)`
    builds the layer at the given ranks, one for each spectrum.
    """

    spectra: tuple[Tensor, ...]
    cut: Callable[[tuple[int, ...]], LatentLayer]


def layer_inputs(
    source: Source,
    layer_idx: int,
    sums: LayerSums,
    rotation: RotationSums,
    inv_freq_F: Tensor,
    *,
    damping: float,
    fisher_damping: float,
    device: torch.device,
) -> LayerInputs:
    """One layer's weights and moments in float64, from its sums."""
    facts = source.facts
    prefix = f"model.layers.{layer_idx}.self_attn."

    def heads(name: str, num_heads: int) -> Tensor | None:
        if prefix + name not in source.names():
            return None
        return (
            source.tensor(prefix + name).to(device, torch.float64).unflatten(0, (num_heads, facts.head_dim))
        )

    def required(name: str, num_heads: int) -> Tensor:
        weight = heads(name, num_heads)
        assert weight is not None, name
        return weight

    def scaled(xx_DD: Tensor) -> Tensor:
        return xx_DD * (c_DD.trace() / xx_DD.trace())

    num_heads, num_kv_heads = facts.num_attention_heads, facts.num_key_value_heads
    sums, rotation = sums.to(device), rotation.to(device)
    c_DD = sums.xx_DD / sums.tokens
    return LayerInputs(
        layer_idx=layer_idx,
        w_q_NHD=required("q_proj.weight", num_heads),
        w_k_GHD=required("k_proj.weight", num_kv_heads),
        w_v_GHD=required("v_proj.weight", num_kv_heads),
        b_q_NH=heads("q_proj.bias", num_heads),
        b_k_GH=heads("k_proj.bias", num_kv_heads),
        b_v_GH=heads("v_proj.bias", num_kv_heads),
        c_DD=c_DD,
        felt_c_DD=(scaled(sums.key_felt_xx_DD) + scaled(sums.value_felt_xx_DD)) / 2,
        mean_D=sums.x_D / sums.tokens,
        mean_abs_D=sums.abs_x_D / sums.tokens,
        q_energy_NF=sums.q_energy_NF / sums.tokens,
        gamma_NF=rotation.gamma_NF,
        fisher_exact_OO=sums.fisher_exact_OO / sums.tokens,
        fisher_nope_OO=sums.fisher_nope_OO / sums.tokens,
        inv_freq_F=inv_freq_F.to(device, torch.float64),
        unscaled_F=torch.tensor(unscaled(facts), device=device),
        rope_theta=facts.rope_theta,
        damping=damping,
        fisher_damping=fisher_damping,
    )


class CalibratedLayers:
    """The layers of a calibrated model as `LayerInputs`; the last one asked for is kept.

    Args:
        source: the model.
        workspace: the work folder with its `statistics/` and `rotation/`.
        inv_freq_F: RoPE's angles per position.
        damping: of C.
        device: where factoring happens.
    """

    def __init__(
        self,
        source: Source,
        workspace: Workspace,
        inv_freq_F: Tensor,
        *,
        damping: float,
        device: torch.device,
    ) -> None:
        self._source = source
        self._workspace = workspace
        self._inv_freq_F = inv_freq_F
        self.damping = damping
        self._device = device
        self._kept: tuple[int, LayerInputs] | None = None

    def __len__(self) -> int:
        return self._source.facts.num_hidden_layers

    def __getitem__(self, layer_idx: int) -> LayerInputs:
        if self._kept is None or self._kept[0] != layer_idx:
            sums = LayerSums.load(self._workspace.path("statistics", layer_file(layer_idx)))
            self._kept = (
                layer_idx,
                layer_inputs(
                    self._source,
                    layer_idx,
                    sums,
                    RotationSums.load(self._workspace.path("rotation", layer_file(layer_idx))),
                    self._inv_freq_F,
                    damping=self.damping,
                    fisher_damping=0.03 if float(sums.tokens) >= FISHER_TOKENS else 0.1,
                    device=self._device,
                ),
            )
        return self._kept[1]
