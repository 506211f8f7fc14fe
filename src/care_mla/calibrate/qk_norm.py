"""What QK-norm does inside a decoder layer of the source, watched while calibration runs through it.

Queries and keys are normalised between their projections and RoPE, out of the attention function's sight.
Reads a live layer; writes nothing.
"""
# Shapes: B sequences, L positions, N query heads, G KV heads, H head_dim, X what the norm is given.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class QkNormObserver:
    """Catches normalised queries and keys, and the gradient at the keys before their norm.

    Args:
        head_dim: H.
    """

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        self._caught: dict[str, Tensor] = {}

    @property
    def q_BLNH(self) -> Tensor:
        """Normalised queries of the last call, before RoPE."""
        return self._heads("q_norm")

    @property
    def k_BLGH(self) -> Tensor:
        """Normalised keys of the last call, before RoPE."""
        return self._heads("k_norm")

    @property
    def grad_projected_k_BLGH(self) -> Tensor:
        """After `backward`: the gradient at the keys as their projection gives them, before the norm."""
        grad_BLX = self._caught["k_proj"].grad
        assert grad_BLX is not None
        return grad_BLX.flatten(2).unflatten(2, (-1, self.head_dim))

    def _heads(self, name: str) -> Tensor:
        return self._caught[name].detach().flatten(2).unflatten(2, (-1, self.head_dim))

    @contextmanager
    def watch(self, layer: Any) -> Iterator[None]:
        """Watch a decoder layer's norms for the duration of the block; it must run with gradients."""

        def keep(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                self._caught[name] = output
                if name == "k_norm":
                    self._caught["k_proj"] = args[0]
                    args[0].retain_grad()

            return hook

        handles = [
            getattr(layer.self_attn, name).register_forward_hook(keep(name)) for name in ("q_norm", "k_norm")
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._caught.clear()
