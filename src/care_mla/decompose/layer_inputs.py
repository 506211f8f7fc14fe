"""What every factorisation method starts from, and what it returns."""
# Shapes: D hidden_size, N query heads, G KV heads, H head_dim, F frequencies (H/2), O = 2*G*H rows [keys;
#         values].

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from care_mla.calibrate.statistics import LayerSums, QkNormSums, RotationSums, sums_class
from care_mla.decompose.qk_norm import AffineMap, LayerQkNorm, NormedMoments, nearest_map
from care_mla.factors import LatentLayer
from care_mla.families.rope import pair_order, passed_scale
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

    Where RoPE passes `passed_dim` rows of each head, queries and keys have their rows in `pair_order`: all of
    the head is half-split pairs, and the pairs that RoPE passes come last, with an angle of 0. They never
    join a rope key.
    Where the source has QK-norm, `qk_norm` holds it. Projections then are those before the norm, and so are
    the gradients at keys in `felt_c_DD` and `fisher_exact_OO`; queries and keys in `q_energy_NF`, `gamma_NF`
    and `fisher_nope_OO` are normalised. `without_qk_norm` is the layer for forms that cannot keep a norm.
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
    passed_dim: int = 0
    qk_norm: LayerQkNorm | None = None

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
    def rotary_dim(self) -> int:
        """Rows of a head that RoPE turns."""
        return self.head_dim - self.passed_dim

    @property
    def damped_c_DD(self) -> Tensor:
        """C + damping * mean(diag C) * I: every method uses this one, so that they differ in nothing else."""
        return damp(self.c_DD, self.damping)

    @cached_property
    def without_qk_norm(self) -> LayerInputs:
        """The layer with the linear maps that come nearest to its normalised queries and keys.

        Without QK-norm, the layer itself.
        """
        if self.qk_norm is None:
            return self
        moments = self.qk_norm.moments
        assert moments is not None, "a norm over all heads at once has no linear map: check_form refuses it"
        given = {"c_DD": self.c_DD, "damped_c_DD": self.damped_c_DD, "mean_D": self.mean_D}
        query, key = (
            nearest_map(AffineMap(w_XHD, b_XH), norm_XH, y_x_XHD, y_XH, **given)
            for w_XHD, b_XH, norm_XH, y_x_XHD, y_XH in (
                (self.w_q_NHD, self.b_q_NH, self.qk_norm.q_norm_XH, moments.q_x_NHD, moments.q_NH),
                (self.w_k_GHD, self.b_k_GH, self.qk_norm.k_norm_XH, moments.k_x_GHD, moments.k_GH),
            )
        )
        return replace(
            self,
            w_q_NHD=query.w_XHD,
            w_k_GHD=key.w_XHD,
            b_q_NH=query.b_XH,
            b_k_GH=key.b_XH,
            felt_c_DD=moments.felt_c_DD,
            qk_norm=None,
        )

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
    builds the layer at the given ranks, one for each spectrum. `rope_kept_N` is that of `ComplexSplit`, where
    the method splits so.
    """

    spectra: tuple[Tensor, ...]
    cut: Callable[[tuple[int, ...]], LatentLayer]
    rope_kept_N: Tensor | None = None


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

    def felt(key_felt_xx_DD: Tensor) -> Tensor:
        keys_DD, values_DD = key_felt_xx_DD, sums.value_felt_xx_DD
        return (keys_DD / keys_DD.trace() + values_DD / values_DD.trace()) * (c_DD.trace() / 2)

    def ordered(x_NH: Tensor) -> Tensor:
        """Rows of queries or keys in `pair_order`, all with RoPE's amplitude before them."""
        x_NH = x_NH.clone()
        x_NH[:, facts.rotary_dim :] *= passed_scale(facts)
        return x_NH[:, pair_order(facts)]

    num_heads, num_kv_heads = facts.num_attention_heads, facts.num_key_value_heads
    b_q_NH, b_k_GH = heads("q_proj.bias", num_heads), heads("k_proj.bias", num_kv_heads)
    sums, rotation = sums.to(device), rotation.to(device)
    c_DD = sums.xx_DD / sums.tokens
    return LayerInputs(
        layer_idx=layer_idx,
        w_q_NHD=ordered(required("q_proj.weight", num_heads)),
        w_k_GHD=ordered(required("k_proj.weight", num_kv_heads)),
        w_v_GHD=required("v_proj.weight", num_kv_heads),
        b_q_NH=None if b_q_NH is None else ordered(b_q_NH),
        b_k_GH=None if b_k_GH is None else ordered(b_k_GH),
        b_v_GH=heads("v_proj.bias", num_kv_heads),
        c_DD=c_DD,
        felt_c_DD=felt(sums.key_felt_xx_DD),
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
        passed_dim=facts.head_dim - facts.rotary_dim,
        qk_norm=_qk_norm(source, prefix, sums, felt),
    )


def _qk_norm(
    source: Source, prefix: str, sums: LayerSums, felt: Callable[[Tensor], Tensor]
) -> LayerQkNorm | None:
    if source.facts.qk_norm is None:
        return None
    q_norm_XH, k_norm_XH = (
        source.tensor(f"{prefix}{name}.weight").to(sums.tokens).unflatten(0, (-1, source.facts.head_dim))
        for name in ("q_norm", "k_norm")
    )
    moments = None
    if isinstance(sums, QkNormSums):
        moments = NormedMoments(
            q_x_NHD=sums.normed_q_x_NHD / sums.tokens,
            k_x_GHD=sums.normed_k_x_GHD / sums.tokens,
            q_NH=sums.normed_q_NH / sums.tokens,
            k_GH=sums.normed_k_GH / sums.tokens,
            felt_c_DD=felt(sums.normed_key_felt_xx_DD),
        )
    return LayerQkNorm(q_norm_XH=q_norm_XH, k_norm_XH=k_norm_XH, moments=moments)


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
            path = self._workspace.path("statistics", layer_file(layer_idx))
            sums = sums_class(self._source.facts).load(path)
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
