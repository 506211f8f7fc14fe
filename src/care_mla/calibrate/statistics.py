"""Running sums over calibration tokens: everything that any method, rank or budget needs from one layer.

Sums are float64 and add up: two halves of a text merge into the whole. Written to
`statistics/layer_00.safetensors` and `rotation/layer_00.safetensors` in the work folder.
"""
# Shapes: B sequences, L positions, D hidden_size, N query heads, G KV heads, H head_dim, F frequencies (H/2),
#         O = 2*G*H rows [keys of all KV heads; values of all KV heads], X = G*H rows of the keys alone.

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from care_mla.errors import ResumeError
from care_mla.facts import ModelFacts
from care_mla.workspace import save_tensors

MARKS = "care-mla"
# Of the covariance behind leverage: how much of it is weighted by attention received, and its damping
# relative to its mean eigenvalue. From 0.3 to 0.6 the first changes nothing that can be measured.
RECEIVED_SHARE = 0.3
LEVERAGE_DAMPING = 0.01


@dataclass
class Sums:
    """Tensors that are sums over tokens. Subclasses name them; all are float64 (or complex128)."""

    tokens: Tensor

    def save(self, path: Path, **marks: str) -> None:
        """Write all sums and the given marks to one safetensors file, atomically."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        real = {name: torch.view_as_real(t) if t.is_complex() else t for name, t in tensors.items()}
        described = {"complex": [name for name, t in tensors.items() if t.is_complex()], **marks}
        # One key, since safetensors writes several in any order, and the same sums must give the same bytes.
        save_tensors(path, real, {MARKS: json.dumps(described, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read sums that `save` wrote.

        Raises:
            ResumeError: another version of care wrote them, and some are missing.
        """
        with safe_open(path, "pt") as file:
            names = [f.name for f in fields(cls)]
            if missing := sorted(set(names) - set(file.keys())):
                raise ResumeError(
                    f"{path}: has no {', '.join(missing)}: another version of care wrote it. Choose another "
                    f"folder with --work FOLDER, or remove this one: rm -r {path.parent.parent}"
                )
            complex_names = json.loads(file.metadata()[MARKS])["complex"]
            read = {name: file.get_tensor(name) for name in names}
        return cls(**{n: torch.view_as_complex(t) if n in complex_names else t for n, t in read.items()})

    def to(self, device: torch.device) -> Self:
        """The same sums on another device."""
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @classmethod
    def merge(cls, parts: Sequence[tuple[Self, float]]) -> Self:
        """Weighted sum of several runs.

        Weight 1 for each is the statistics of all their tokens together; weight pi_i / tokens_i mixes corpora
        in the proportions pi_i whatever their sizes (the paper's C_mix).
        """
        scaled = [{f.name: weight * getattr(part, f.name) for f in fields(cls)} for part, weight in parts]
        return cls(**{name: torch.stack([each[name] for each in scaled]).sum(0) for name in scaled[0]})


def marks(path: Path) -> dict[str, Any]:
    """The marks that `Sums.save` put on a file; empty where there is no file."""
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[MARKS])


@dataclass
class LayerSums(Sums):
    """One layer's sums over tokens; `x` is the input of the attention projections, after the layer's norm.

    The Fisher matrices are sums of v g g^T, g the gradient at [keys; values] and v the token's leverage: C x
    G0 is then nearer to the Fisher information E[(x x^T) x (g g^T)] than with v = 1, where the few tokens
    that all others attend to (an attention sink), alike in x and large in g, decide G0 alone.
    `key_felt_xx_DD` and `value_felt_xx_DD` are sums of |g|^2 x x^T with g the gradient at the token's key or
    value. Of keys that QK-norm normalises, `fisher_exact_OO` and `key_felt_xx_DD` take the gradient before
    the norm, at what the projection gives.
    """

    xx_DD: Tensor
    x_D: Tensor
    abs_x_D: Tensor
    q_energy_NF: Tensor
    fisher_exact_OO: Tensor
    fisher_nope_OO: Tensor
    key_felt_xx_DD: Tensor
    value_felt_xx_DD: Tensor

    @classmethod
    def zeros(
        cls, *, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
    ) -> Self:
        """Empty sums for a layer of the given dimensions."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        rows = 2 * num_kv_heads * head_dim
        return cls(
            tokens=zeros(),
            xx_DD=zeros(hidden_size, hidden_size),
            x_D=zeros(hidden_size),
            abs_x_D=zeros(hidden_size),
            q_energy_NF=zeros(num_heads, head_dim // 2),
            fisher_exact_OO=zeros(rows, rows),
            fisher_nope_OO=zeros(rows, rows),
            key_felt_xx_DD=zeros(hidden_size, hidden_size),
            value_felt_xx_DD=zeros(hidden_size, hidden_size),
        )

    def add(
        self,
        x_BLD: Tensor,
        leverage_DD: Tensor,
        q_energy_NF: Tensor,
        grad_k_BLGH: Tensor,
        grad_nope_BLGH: Tensor,
        grad_v_BLGH: Tensor,
    ) -> None:
        """Add one micro-batch: products in its own precision, totals in float64.

        Args:
            leverage_DD: from `RotationSums`; a token counts x^T leverage x times in the Fisher matrices.
        """
        x_TD = x_BLD.flatten(0, 1)
        leverage_T1 = ((x_TD @ leverage_DD.to(x_TD)) * x_TD).sum(-1, keepdim=True)
        self.tokens += x_TD.shape[0]
        self.xx_DD += x_TD.T @ x_TD
        self.x_D += x_TD.sum(0)
        self.abs_x_D += x_TD.abs().sum(0)
        self.q_energy_NF += q_energy_NF
        grad_v_TO = grad_v_BLGH.flatten(0, 1).flatten(1)
        for total_OO, grad_BLGH in (
            (self.fisher_exact_OO, grad_k_BLGH),
            (self.fisher_nope_OO, grad_nope_BLGH),
        ):
            grad_TO = torch.cat([grad_BLGH.flatten(0, 1).flatten(1), grad_v_TO], dim=1)
            total_OO += grad_TO.T @ (leverage_T1 * grad_TO)
        # Inputs weighted by how much the loss feels this token's key, and its value.
        for total_DD, grad_BLGH in ((self.key_felt_xx_DD, grad_k_BLGH), (self.value_felt_xx_DD, grad_v_BLGH)):
            felt_T1 = grad_BLGH.flatten(2).square().sum(-1).flatten()[:, None]
            total_DD += x_TD.T @ (felt_T1 * x_TD)


@dataclass
class QkNormSums(LayerSums):
    """One layer's sums where every head of queries and keys is normalised before RoPE.

    Besides those of `LayerSums`: the sums of normalised queries and keys, by themselves and times the input
    x, from which the linear maps that come nearest to them follow; and of |g|^2 x x^T with g the gradient at
    the normalised key.
    """

    normed_q_x_NHD: Tensor
    normed_k_x_GHD: Tensor
    normed_q_NH: Tensor
    normed_k_GH: Tensor
    normed_key_felt_xx_DD: Tensor

    @classmethod
    def zeros(
        cls, *, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
    ) -> Self:
        """Empty sums for a layer of the given dimensions."""
        plain = LayerSums.zeros(
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            device=device,
        )

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            **{f.name: getattr(plain, f.name) for f in fields(plain)},
            normed_q_x_NHD=zeros(num_heads, head_dim, hidden_size),
            normed_k_x_GHD=zeros(num_kv_heads, head_dim, hidden_size),
            normed_q_NH=zeros(num_heads, head_dim),
            normed_k_GH=zeros(num_kv_heads, head_dim),
            normed_key_felt_xx_DD=zeros(hidden_size, hidden_size),
        )

    def add_normed(self, x_BLD: Tensor, q_BLNH: Tensor, k_BLGH: Tensor, grad_k_BLGH: Tensor) -> None:
        """Add a micro-batch's normalised queries and keys, and the gradient at the keys; all before RoPE."""
        x_TD = x_BLD.flatten(0, 1)
        for total_XHD, total_XH, y_BLXH in (
            (self.normed_q_x_NHD, self.normed_q_NH, q_BLNH),
            (self.normed_k_x_GHD, self.normed_k_GH, k_BLGH),
        ):
            y_TO = y_BLXH.flatten(0, 1).flatten(1)
            total_XHD += (y_TO.T @ x_TD).view_as(total_XHD)
            total_XH += y_TO.sum(0).view_as(total_XH)
        felt_T1 = grad_k_BLGH.flatten(2).square().sum(-1).flatten()[:, None]
        self.normed_key_felt_xx_DD += x_TD.T @ (felt_T1 * x_TD)


def sums_class(facts: ModelFacts) -> type[LayerSums]:
    """What is summed up in each layer of a model."""
    return QkNormSums if facts.qk_norm == "head" else LayerSums


@dataclass
class RotationSums(Sums):
    """One layer's sums for gamma, the mean rotation that each query head sees at each frequency.

    Sums over query positions t and key positions s of w_ts |q_t,f|^2 |k_s,f|^2, with and without e^(i theta_f
    (s - t)); w = a(1 - a), a the attention probabilities. And the sum of x x^T over the inputs x of the
    projections, in which a token counts more the more attention it receives from all queries and heads.
    """

    turned_NF: Tensor
    weight_NF: Tensor
    attended_xx_DD: Tensor
    length: Tensor

    @classmethod
    def zeros(
        cls, *, hidden_size: int, num_heads: int, head_dim: int, length: int, device: torch.device
    ) -> Self:
        """Empty sums; `length` is the longest sequence, since gamma depends on it."""
        return cls(
            tokens=torch.zeros((), dtype=torch.float64, device=device),
            turned_NF=torch.zeros(num_heads, head_dim // 2, dtype=torch.complex128, device=device),
            weight_NF=torch.zeros(num_heads, head_dim // 2, dtype=torch.float64, device=device),
            attended_xx_DD=torch.zeros(hidden_size, hidden_size, dtype=torch.float64, device=device),
            length=torch.tensor(float(length), dtype=torch.float64, device=device),
        )

    def add_inputs(self, x_BLD: Tensor, received_BL: Tensor) -> None:
        """Add the inputs of whole sequences and the attention that each of their tokens received."""
        x_TD = x_BLD.flatten(0, 1)
        # Every query of every head gives away 1, so that received / N is 1 on average.
        received_T1 = received_BL.flatten()[:, None] / len(self.turned_NF)
        self.attended_xx_DD += x_TD.T @ ((1 - RECEIVED_SHARE + RECEIVED_SHARE * received_T1) * x_TD)

    @classmethod
    def merge(cls, parts: Sequence[tuple[Self, float]]) -> Self:
        """As `Sums.merge`; the length is the longest, since it is no sum."""
        merged = super().merge(parts)
        merged.length = torch.stack([part.length for part, _ in parts]).max()
        return merged

    @property
    def gamma_NF(self) -> Tensor:
        """The best constant in place of the rotation, complex128.

        gamma minimises sum_ts w_ts |conj(q_t) k_s (e^(i theta (s - t)) - gamma)|^2 at each frequency: the
        mean rotation, weighted by how much an output moves with the logit and by how large the logit's part
        is.
        """
        return self.turned_NF / self.weight_NF.clamp_min(torch.finfo(torch.float64).tiny)

    @property
    def leverage_DD(self) -> Tensor:
        """The inverse of a covariance, over D: x^T leverage x is a token's leverage, about 1 on average.

        Tokens that receive much attention count more in that covariance, and so less by their leverage.
        """
        size = len(self.attended_xx_DD)
        covariance_DD = self.attended_xx_DD / self.tokens
        covariance_DD.diagonal().add_(LEVERAGE_DAMPING * covariance_DD.trace() / size)
        return torch.cholesky_inverse(torch.linalg.cholesky(covariance_DD)) / size
