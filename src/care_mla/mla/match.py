"""Block matching: each converted attention is trained until the residual stream is the original's again.

Layer by layer in order, the original and the converted stream go up the model side by side. A layer's
attention is given the converted stream, as the matched layers below leave it, and is trained so that the
stream after it equals the original's there; so it makes up for the errors below as well as for its own. One
layer is in memory at a time; the streams lie in the work folder, one file for each batch of sequences.

Reads the factored layers and token blocks; writes `match_…/layer_000.safetensors` and what became of the
error. A killed run goes on at the layer and batch where it was and gives the same bytes, since a file is
complete or absent and nothing random outlives a layer.
"""
# Shapes: B sequences, L positions, D hidden_size, R kv_lora_rank, X any axes.

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from care_mla.calibrate.layers import LayerStack
from care_mla.factors import LatentLayer
from care_mla.matching_plan import MATCHING_BATCH_TOKENS
from care_mla.mla.divergence import Candidate, stand_in
from care_mla.mla.mapping import attention_state_dict
from care_mla.workspace import Workspace, fingerprint, layer_file, read_json, save_tensors, write_json

# Of a step, as a share of the root mean square of the weights that it moves; falls linearly to 0.
LEARNING_RATE = 0.003
BETAS = (0.9, 0.95)
# Of the batches, one in so many is held out: whether a layer is better is judged on those.
HELD_OUT_SHARE = 8
# What a weight's scale is taken over; the latent's channels may differ in scale by orders of magnitude.
SCALE_AXES: dict[str, tuple[int, ...]] = {
    "down_RD": (1,),
    "up_k_GMR": (0, 1),
    "up_v_GHR": (0, 1),
    "q_rope_NPD": (1, 2),
    "q_nope_NMD": (1, 2),
    "k_rope_JPD": (1, 2),
    "o_weight_DO": (0, 1),
}


@dataclass(frozen=True, kw_only=True)
class Matching:
    """How to match: `steps` of Adam for each layer, in an order of batches that `seed` decides."""

    steps: int
    seed: int
    learning_rate: float = LEARNING_RATE


class Batch:
    """The two streams of one batch of sequences, in a file of its own, at the input of some layer."""

    def __init__(self, folder: Path, index: int, device: torch.device) -> None:
        self.folder = folder
        self.index = index
        self.device = device

    def path(self, layer_idx: int) -> Path:
        return self.folder / f"batch_{self.index:05}_layer_{layer_idx:03}.safetensors"

    def load(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """(original, converted) streams at the layer's input, each (B, L, D)."""
        streams = load_file(self.path(layer_idx), device=str(self.device))
        return streams["original"], streams["converted"]

    def save(self, layer_idx: int, original_BLD: Tensor, converted_BLD: Tensor) -> None:
        """Write the streams at the layer's input; those below it are no longer needed."""
        save_tensors(self.path(layer_idx), {"original": original_BLD, "converted": converted_BLD})
        self.path(layer_idx - 1).unlink(missing_ok=True)

    def reached(self, num_layers: int) -> int | None:
        """The highest layer whose input is there; None: no layer's is."""
        return max((i for i in range(num_layers) if self.path(i).exists()), default=None)


def match_layers(
    stack: LayerStack,
    layers: Candidate,
    tokens_BL: Tensor,
    workspace: Workspace,
    matching: Matching,
    *,
    depends_on: Any,
    advance: Callable[[dict[str, float]], None] = lambda row: None,
) -> tuple[Candidate, list[dict[str, float]]]:
    """Match every layer, once; returns how to read them back, and the error of each before and after.

    Args:
        layers: gives the factored layer of a 0-based index.
        tokens_BL: packed blocks, no padding.
        depends_on: all that the layers depend on, as JSON holds it.
        advance: called after each layer with its errors.
    """
    name = f"match_{fingerprint([depends_on, vars(matching), tokens_BL.tolist()])}"
    paths = [workspace.path(name, layer_file(i)) for i in range(stack.num_layers)]
    # Every token is a regression on D numbers, so small batches have little noise.
    parts = tokens_BL.split(max(1, MATCHING_BATCH_TOKENS // tokens_BL.shape[1]))
    batches = [Batch(workspace.path(name, "streams"), i, stack.device) for i in range(len(parts))]
    if not _row_path(paths[-1]).exists():
        for batch, part in zip(batches, parts, strict=True):
            if batch.reached(stack.num_layers) is None:
                x_BLD = stack.embed(part)
                batch.save(0, x_BLD, x_BLD.clone())
        for layer_idx, path in enumerate(paths):
            if min(batch.reached(stack.num_layers) or 0 for batch in batches) <= layer_idx:
                with stack.layer(layer_idx) as layer:
                    if not _row_path(path).exists():
                        latent, row = match_layer(
                            stack, layer, layer_idx, layers(layer_idx), batches, matching
                        )
                        latent.to("cpu", torch.float32).save(path)
                        write_json(_row_path(path), row)
                    if layer_idx + 1 < stack.num_layers:
                        _push(stack, layer, layer_idx, LatentLayer.load(path), batches)
            advance(read_json(_row_path(path)))
    else:
        for path in paths:
            advance(read_json(_row_path(path)))
    workspace.clear(f"{name}/streams")
    return lambda layer_idx: LatentLayer.load(paths[layer_idx]), [
        read_json(_row_path(path)) for path in paths
    ]


def _row_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def match_layer(
    stack: LayerStack,
    layer: Any,
    layer_idx: int,
    latent: LatentLayer,
    batches: list[Batch],
    matching: Matching,
) -> tuple[LatentLayer, dict[str, float]]:
    """Train one layer's attention; it stays as it is where text held out from training finds it no better."""
    generator = torch.Generator().manual_seed(matching.seed * 1_000_003 + layer_idx)
    original = layer.self_attn
    latent = latent.to(stack.device, torch.float32)
    if latent.o_weight_DO is None:
        latent = replace(latent, o_weight_DO=original.o_proj.weight.detach())
    held_out = batches[-max(1, len(batches) // HELD_OUT_SHARE) :]
    trained_on = batches[: -len(held_out)] or batches
    weights = Weights(latent)
    module = stand_in(stack, layer_idx, latent, original)
    optimizer = torch.optim.Adam(weights.moves.values(), lr=1.0, betas=BETAS)
    order: list[int] = []

    def loss_on(batch: Batch, attention: nn.Module) -> Tensor:
        original_BLD, converted_BLD = batch.load(layer_idx)
        with torch.no_grad():
            target_BLD = after_attention(stack, layer, original, original_BLD)
        return relative_error(after_attention(stack, layer, attention, converted_BLD), target_BLD)

    def error(attention: nn.Module) -> float:
        with torch.no_grad():
            return sum(loss_on(batch, attention).item() for batch in held_out) / len(held_out)

    with without_mlp(layer):
        before = error(module)
        for step in range(matching.steps):
            order = order or torch.randperm(len(trained_on), generator=generator).tolist()
            for group in optimizer.param_groups:
                group["lr"] = matching.learning_rate * (1 - step / matching.steps)
            optimizer.zero_grad()
            loss_on(trained_on[order.pop()], Moving(module, weights)).backward()
            optimizer.step()
        matched = weights.layer()
        after = error(stand_in(stack, layer_idx, matched, original))
    layer.self_attn = original
    if not after < before:
        return latent, {"error_before": before, "error_after": before}
    return matched, {"error_before": before, "error_after": after}


def relative_error(found_BLD: Tensor, target_BLD: Tensor) -> Tensor:
    """Mean over tokens of the squared error of the stream over its squared size.

    The norms that read the stream see it so; in a plain squared error a few tokens of enormous size (the
    first of a text) would count for all.
    """
    size_BL = target_BLD.square().sum(-1)
    return ((found_BLD - target_BLD).square().sum(-1) / size_BL.clamp_min(1e-12)).mean()


class Weights:
    """The tensors of a latent layer as they were, and how far training has moved each from there.

    A move is counted in root mean squares of the weights that it belongs to, so that one learning rate suits
    all of them, whatever the scale of the factors. Frequencies stay.
    """

    def __init__(self, latent: LatentLayer) -> None:
        self.start = latent
        self.scales: dict[str, Tensor] = {}
        self.moves: dict[str, Tensor] = {}
        for name, tensor in latent.tensors().items():
            axes = SCALE_AXES.get(name, tuple(range(tensor.ndim)))
            if name != "inv_freq_JF" and tensor.numel():
                self.scales[name] = tensor.square().mean(axes, keepdim=True).sqrt()
                self.moves[name] = torch.zeros_like(tensor, requires_grad=True)

    def moved(self) -> LatentLayer:
        """The layer where it is now, with gradients to the moves."""
        start = self.start.tensors()
        return replace(
            self.start, **{name: start[name] + self.scales[name] * move for name, move in self.moves.items()}
        )

    @torch.no_grad()
    def layer(self) -> LatentLayer:
        """The layer where it is now."""
        return self.moved()


class Moving(nn.Module):
    """Latent attention with the weights of a training step in place of the module's own."""

    def __init__(self, module: nn.Module, weights: Weights) -> None:
        super().__init__()
        self.module = module
        self.weights = weights

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        layer = self.weights.moved()
        assert layer.o_weight_DO is not None
        bias = self.module.get_submodule("o_proj").bias
        state = attention_state_dict(layer, layer.o_weight_DO, None if bias is None else bias)
        return torch.func.functional_call(self.module, state, args, kwargs)


def after_attention(stack: LayerStack, layer: Any, attention: nn.Module, x_BLD: Tensor) -> Tensor:
    """The stream after a layer's attention (and the norm behind it, in a post-norm model)."""
    layer.self_attn = attention
    return stack.run(layer, x_BLD)


class NoMlp(nn.Module):
    """An MLP that adds nothing to the stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


@contextmanager
def without_mlp(layer: Any) -> Iterator[None]:
    """Let a layer give the stream after its attention for the duration of the block."""
    mlp = layer.mlp
    layer.mlp = NoMlp()
    try:
        yield
    finally:
        layer.mlp = mlp


@torch.no_grad()
def _push(stack: LayerStack, layer: Any, layer_idx: int, latent: LatentLayer, batches: list[Batch]) -> None:
    """Take both streams of every batch from the layer's input to the next one's."""
    original = layer.self_attn
    matched = stand_in(stack, layer_idx, latent, original)
    for batch in batches:
        if batch.path(layer_idx + 1).exists():
            continue
        original_BLD, converted_BLD = batch.load(layer_idx)
        layer.self_attn = original
        original_BLD = stack.run(layer, original_BLD)
        layer.self_attn = matched
        batch.save(layer_idx + 1, original_BLD, stack.run(layer, converted_BLD))
    layer.self_attn = original
