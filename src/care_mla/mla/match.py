"""Block matching: each converted attention is trained until the residual stream is the original's again.

Layer by layer in order, the original and the converted stream go up the model side by side. A layer's
attention is given the converted stream, as the matched layers below leave it, and is trained so that the
stream after it equals the original's there; so it makes up for the errors below as well as for its own. One
layer is in memory at a time, and both streams of all tokens.

Reads the factored layers and token blocks; writes `match_…/layer_000.safetensors` and what became of the
error. A killed run goes on at the layer where it was and gives the same bytes, since a file is complete or
absent and nothing random outlives a layer.
"""
# Shapes: B sequences, L positions, D hidden_size, R kv_lora_rank, X any axes.

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from care_mla.calibrate.layers import LayerStack
from care_mla.calibrate.stream import micro_batches
from care_mla.device import has_fast_bfloat16
from care_mla.factors import LatentLayer
from care_mla.matching_plan import HELD_OUT_SHARE, MATCHING_BATCH_TOKENS
from care_mla.mla.causal_blocks import CAUSAL_BLOCKS
from care_mla.mla.divergence import Candidate, stand_in
from care_mla.mla.mapping import attention_state_dict
from care_mla.workspace import Workspace, fingerprint, layer_file, read_json, save_tensors, write_json

# Of a step, as a share of the root mean square of the weights that it moves; falls linearly to 0.
LEARNING_RATE = 0.005
BETAS = (0.9, 0.95)
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
    """How to match: `steps` of Adam for each layer, in an order of batches that `seed` decides.

    With `heads_apart` the query heads of a KV head part in the up-projections, for classes that have rows for
    each of them anyway: more to train, and no cached value more.
    """

    steps: int
    seed: int
    learning_rate: float = LEARNING_RATE
    heads_apart: bool = False


class Streams(NamedTuple):
    """The original's residual stream and the converted model's at the same place, each (B, L, D)."""

    original_BLD: Tensor
    converted_BLD: Tensor


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
    folder = workspace.path(name, "streams")
    # A file is complete or absent, so the highest layer's input there is where to go on.
    reached = max((i for i in range(stack.num_layers) if _input_path(folder, i).exists()), default=0)
    if _row_path(paths[-1]).exists():
        reached = stack.num_layers
    for path in paths[:reached]:
        advance(read_json(_row_path(path)))
    if reached < stack.num_layers:
        if reached:
            streams = Streams(**load_file(_input_path(folder, reached)))
        else:
            x_BLD = stack.embed(tokens_BL).cpu()
            streams = Streams(x_BLD, x_BLD)
        for layer_idx in range(reached, stack.num_layers):
            path = paths[layer_idx]
            with stack.layer(layer_idx) as layer:
                with without(layer, "mlp"):
                    target_BLD = run_all(stack, layer, streams.original_BLD)
                if not _row_path(path).exists():
                    latent, row = match_layer(
                        stack,
                        layer,
                        layer_idx,
                        layers(layer_idx),
                        streams.converted_BLD,
                        target_BLD,
                        matching,
                    )
                    latent.to("cpu", torch.float32).save(path)
                    write_json(_row_path(path), row)
                if layer_idx + 1 < stack.num_layers:
                    with without(layer, "self_attn"):
                        original_BLD = run_all(stack, layer, target_BLD)
                    original = layer.get_submodule("self_attn")
                    layer.self_attn = stand_in(stack, layer_idx, LatentLayer.load(path), original)
                    streams = Streams(original_BLD, run_all(stack, layer, streams.converted_BLD))
                    layer.self_attn = original
            if layer_idx + 1 < stack.num_layers:
                # The next layer's input first: with it there, this layer is not looked at again.
                save_tensors(_input_path(folder, layer_idx + 1), streams._asdict())
                _input_path(folder, layer_idx).unlink(missing_ok=True)
            advance(read_json(_row_path(path)))
    workspace.clear(f"{name}/streams")
    rows = [read_json(_row_path(path)) for path in paths]
    return lambda layer_idx: LatentLayer.load(paths[layer_idx]), rows


def _row_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _input_path(folder: Path, layer_idx: int) -> Path:
    return folder / f"input_of_{layer_file(layer_idx)}"


def match_layer(
    stack: LayerStack,
    layer: Any,
    layer_idx: int,
    latent: LatentLayer,
    x_BLD: Tensor,
    target_BLD: Tensor,
    matching: Matching,
) -> tuple[LatentLayer, dict[str, float]]:
    """Train one layer's attention; it stays as it is where text held out from training finds it no better.

    Args:
        layer: the source's decoder layer; its attention is the source's again at the end.
        latent: the attention to begin with.
        x_BLD: the converted stream at the layer's input.
        target_BLD: the original's stream after its attention.
    """
    original = layer.self_attn
    latent = latent.to(stack.device, torch.float32)
    if matching.heads_apart:
        latent = latent.with_heads_apart()
    if latent.o_weight_DO is None:
        latent = replace(latent, o_weight_DO=original.o_proj.weight.detach())
    num_held_out = -(-len(x_BLD) // HELD_OUT_SHARE)
    held_out = torch.arange(len(x_BLD))[-num_held_out:]
    weights = Weights(latent)

    def loss_on(attention: nn.Module, rows: Tensor) -> Tensor:
        layer.self_attn = attention
        found_BLD = stack.run(layer, x_BLD[rows].to(stack.device))
        return stream_error(found_BLD, target_BLD[rows].to(stack.device))

    def error(tried: LatentLayer) -> float:
        attention = stand_in(stack, layer_idx, tried, original)
        with torch.no_grad():
            return sum(loss_on(attention, row).item() for row in held_out.split(1)) / num_held_out

    with without(layer, "mlp"):
        before = error(latent)
        trained: Any = stand_in(stack, layer_idx, latent, original)
        if stack.device.type == "cpu":
            trained.config._attn_implementation = CAUSAL_BLOCKS
        moving = Moving(trained, weights)
        optimizer = torch.optim.Adam(weights.moves.values(), betas=BETAS, fused=True)
        order = batch_order(max(1, len(x_BLD) - num_held_out), x_BLD.shape[1], matching, layer_idx)
        for step, rows in enumerate(order):
            for group in optimizer.param_groups:
                group["lr"] = matching.learning_rate * (1 - step / matching.steps)
            optimizer.zero_grad()
            with mixed_precision(stack.device):
                loss = loss_on(moving, rows)
            loss.backward()
            optimizer.step()
        matched = weights.layer()
        after = error(matched)
    layer.self_attn = original
    if not after < before:
        return latent, {"error_before": before, "error_after": before}
    return matched, {"error_before": before, "error_after": after}


def batch_order(count: int, length: int, matching: Matching, layer_idx: int) -> Iterator[Tensor]:
    """Which sequences each step is given: all of them in random order before any comes again."""
    generator = torch.Generator().manual_seed(matching.seed * 1_000_003 + layer_idx)
    size = min(count, max(1, MATCHING_BATCH_TOKENS // length))
    rows = torch.empty(0, dtype=torch.int64)
    for _ in range(matching.steps):
        if len(rows) < size:
            rows = torch.cat((rows, torch.randperm(count, generator=generator)))
        yield rows[:size]
        rows = rows[size:]


def stream_error(found_BLD: Tensor, target_BLD: Tensor) -> Tensor:
    """Mean over tokens of log(1 + e), e the squared error of the stream over its squared size.

    The norms that read the stream see it relative to its size; in a plain squared error a few tokens of
    enormous size (the first of a text) would count for all. The logarithm is for the few that are enormous in
    the converted stream alone: of 32,768 tokens of the demo model one had e = 645 at layer 12, where the
    median is 0.01, so that it alone was more than half of the mean.
    """
    size_BL = target_BLD.square().sum(-1)
    return ((found_BLD - target_BLD).square().sum(-1) / size_BL.clamp_min(1e-12)).log1p().mean()


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
        moved: dict[str, Any] = {
            name: start[name] + self.scales[name] * move for name, move in self.moves.items()
        }
        return replace(self.start, **moved)

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
        output = self.module.get_submodule("o_proj")
        assert isinstance(output, nn.Linear)
        state = attention_state_dict(layer, layer.o_weight_DO, output.bias)
        return torch.func.functional_call(self.module, state, args, kwargs)


class Nothing(nn.Module):
    """An attention or MLP that adds nothing to the stream."""

    def __init__(self, *, returns_weights: bool) -> None:
        super().__init__()
        self.returns_weights = returns_weights

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        zeros_BLD = torch.zeros_like(hidden_states)
        return (zeros_BLD, None) if self.returns_weights else zeros_BLD


@contextmanager
def without(layer: Any, part: Literal["self_attn", "mlp"]) -> Iterator[None]:
    """Let one of a layer's two parts add nothing to the stream for the duration of the block."""
    module = getattr(layer, part)
    setattr(layer, part, Nothing(returns_weights=part == "self_attn"))
    try:
        yield
    finally:
        setattr(layer, part, module)


def mixed_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Products in bfloat16, all sums of the stream in float32, where the device is faster at it."""
    if has_fast_bfloat16(device):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


@torch.no_grad()
def run_all(stack: LayerStack, layer: nn.Module, x_BLD: Tensor) -> Tensor:
    """Apply a layer to all sequences, which stay in main memory."""
    result_BLD = torch.empty_like(x_BLD)
    with mixed_precision(stack.device):
        for part in micro_batches(x_BLD):
            result_BLD[part] = stack.run(layer, x_BLD[part].to(stack.device))
    return result_BLD
