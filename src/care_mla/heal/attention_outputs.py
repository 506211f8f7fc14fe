"""What each layer's attention gives in a forward pass, kept for a term of the loss.

By forward hooks, which also run inside compiled layers, and again where activations are computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AttentionOutputs:
    """Keeps the output of every layer's attention, (B, L, D) after `o_proj`, until it is taken.

    Args:
        model: with `model.layers`, each with `self_attn`.
    """

    def __init__(self, model: Any) -> None:
        self.modules: list[Any] = [layer.self_attn for layer in model.model.layers]
        for module in self.modules:
            module.register_forward_hook(_keep)

    def take(self) -> list[Tensor]:
        """The outputs of the last forward pass, layer by layer; they are kept no longer."""
        taken = []
        for module in self.modules:
            output = module.kept_output
            module.kept_output = None
            if output.grad_fn is not None:
                # With gradient checkpointing the backward pass runs the hook once more, and what it then
                # keeps holds all activations of its layer.
                output.grad_fn.register_hook(lambda *_, module=module: setattr(module, "kept_output", None))
            taken.append(output)
        return taken


def _keep(module: Any, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
    module.kept_output = output[0]


def relative_difference(learnt: Any, taught: Any) -> Tensor:
    """Mean over tokens and layers of |student - teacher|^2 / |teacher|^2.

    Relative for each token, since a few tokens may be a hundred times as large.

    Args:
        learnt: one tensor (B, L, D) for each layer; `taught` likewise.
    """
    ratios = [
        (a.float() - b.float()).square().sum(-1) / b.float().square().sum(-1).clamp_min(1e-12)
        for a, b in zip(learnt, taught, strict=True)
    ]
    return torch.stack([ratio.mean() for ratio in ratios]).mean()
