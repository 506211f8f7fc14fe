"""The sweeps over calibration text: one decoder layer in memory at a time, forward and backward.

Reads the source model and token blocks; writes `rotation/layer_00.safetensors` and
`statistics/layer_00.safetensors`. Hidden states between layers are spooled to `spool/`. A killed sweep goes
on at the layer and chunk where it was: each file is complete or absent, and sums are added in a fixed order,
so the result is the same to the last bit.
"""
# Shapes: B sequences, L positions, D hidden_size, S vocabulary, N query heads, F frequencies, T rows of
#         logits, I and O the widths of a linear map, X any leading axes.

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from care_mla.calibrate.attention import OBSERVED, FisherObserver, RotationObserver, Turn, observe
from care_mla.calibrate.qk_norm import QkNormObserver
from care_mla.calibrate.sample import draw
from care_mla.calibrate.statistics import LayerSums, QkNormSums, RotationSums, marks, sums_class
from care_mla.families.rope import pair_order
from care_mla.plan import MICRO_BATCH_TOKENS
from care_mla.workspace import Workspace, layer_file, save_tensors

if TYPE_CHECKING:
    from care_mla.calibrate.layers import LayerStack

HEAD_ROWS = 512
Advance = Callable[[], None]


def micro_batches(x_BLD: Tensor) -> list[slice]:
    """Slices of whole sequences, about `MICRO_BATCH_TOKENS` each, the same however blocks are chunked."""
    size = max(1, MICRO_BATCH_TOKENS // x_BLD.shape[1])
    return [slice(start, min(start + size, x_BLD.shape[0])) for start in range(0, x_BLD.shape[0], size)]


def whole_micro_batches(num_blocks: int, length: int) -> int:
    """A number of blocks rounded up to whole micro-batches, so that chunks do not change any sum."""
    micro = max(1, MICRO_BATCH_TOKENS // length)
    return -(-num_blocks // micro) * micro


def collect_rotation(stack: LayerStack, tokens_BL: Tensor, workspace: Workspace, advance: Advance) -> None:
    """Forward sweep over long sequences: gamma of every head and frequency, see `RotationSums`."""
    facts = stack.source.facts
    turn = Turn.of(stack.inv_freq_F, tokens_BL.shape[1], stack.rope_scale, pair_order(facts))

    def spooled(layer_idx: int) -> Path:
        return _spool_path(workspace, f"rotation_{layer_idx:03}")

    done = sum(workspace.path("rotation", layer_file(i)).exists() for i in range(stack.num_layers))
    for _ in range(done):
        advance()
    if done == stack.num_layers:
        return
    x_BLD = stack.embed(tokens_BL) if done == 0 else _read(spooled(done), stack.device)
    for layer_idx in range(done, stack.num_layers):
        sums = RotationSums.zeros(
            hidden_size=facts.hidden_size,
            num_heads=facts.num_attention_heads,
            head_dim=facts.head_dim,
            length=tokens_BL.shape[1],
            device=stack.device,
        )
        observer = RotationObserver(sums, turn)
        with (
            torch.no_grad(),
            stack.layer(layer_idx, attention=OBSERVED) as layer,
            observe(layer, observer),
            projection_inputs(layer) as seen,
        ):
            for x_1LD in x_BLD.split(1):
                output_1LD = stack.run(layer, x_1LD)
                # Before the output takes its place: in a post-norm model attention is given x itself.
                sums.add_inputs(seen.pop(), observer.received_BL)
                x_1LD.copy_(output_1LD)
        # The next layer's input first: with the sums on disk, it must be there.
        save_tensors(spooled(layer_idx + 1), {"x": x_BLD})
        sums.save(workspace.path("rotation", layer_file(layer_idx)))
        spooled(layer_idx).unlink(missing_ok=True)
        advance()
    spooled(stack.num_layers).unlink(missing_ok=True)


def collect_statistics(
    stack: LayerStack,
    tokens_BL: Tensor,
    workspace: Workspace,
    *,
    seed: int,
    chunk_blocks: int,
    advance: Advance,
) -> None:
    """Forward and backward sweeps, chunk by chunk: moments of inputs, and Fisher matrices, of every layer.

    Args:
        tokens_BL: packed blocks, no padding.
        seed: with a sequence's index it decides that sequence's sampled labels, so chunks and resumes agree.
        chunk_blocks: sequences whose hidden states are spooled at once; rounded up to whole micro-batches.
        advance: called for each layer of each sweep of each chunk, at once for what an earlier run has done.
    """
    chunk_blocks = whole_micro_batches(chunk_blocks, tokens_BL.shape[1])
    total = tokens_BL.shape[0]
    if all(_sequences_in(workspace, i) == total for i in range(stack.num_layers)):
        for _ in range(2 * stack.num_layers * -(-total // chunk_blocks)):
            advance()
        _clean_up(workspace)
        return
    # Half-finished sums cannot go on in chunks of another size: each file says only how far it is.
    workspace.claim("sweep", {"sequences per chunk (--max-spool-gib)": chunk_blocks})
    for chunk_idx, start in enumerate(range(0, tokens_BL.shape[0], chunk_blocks)):
        chunk = _Chunk(stack, tokens_BL[start : start + chunk_blocks], workspace, chunk_idx, start, seed)
        if chunk.is_done():
            for _ in range(2 * stack.num_layers):
                advance()
            continue
        chunk.forward(advance)
        chunk.backward(advance)
    _clean_up(workspace)


def _clean_up(workspace: Workspace) -> None:
    """Remove what only a half-finished sweep needs."""
    workspace.clear("spool")
    workspace.release("sweep")


class _Chunk:
    """One chunk of sequences on its way up and down the model."""

    def __init__(
        self,
        stack: LayerStack,
        tokens_BL: Tensor,
        workspace: Workspace,
        chunk_idx: int,
        first_sequence: int,
        seed: int,
    ) -> None:
        self.stack = stack
        self.tokens_BL = tokens_BL
        self.workspace = workspace
        self.chunk_idx = chunk_idx
        self.first_sequence = first_sequence
        self.seed = seed
        order = pair_order(stack.source.facts)
        self.turn = Turn.of(stack.inv_freq_F, tokens_BL.shape[1], stack.rope_scale, order)

    def is_done(self, layer_idx: int = 0) -> bool:
        """Whether this layer's sums already hold this chunk; layer 0 comes last."""
        return _sequences_in(self.workspace, layer_idx) >= self.first_sequence + len(self.tokens_BL)

    def forward(self, advance: Advance) -> None:
        """Spool the input of every layer, then the gradient at the last hidden state."""
        stack = self.stack
        top = stack.num_layers
        if self._path(f"grad_{top:03}").exists() or any(self.is_done(i) for i in range(top)):
            for _ in range(top):
                advance()
            return
        # A file is complete or absent, so the highest layer input there is where to go on.
        reached = max((i for i in range(top + 1) if self._path(f"hidden_{i:03}").exists()), default=0)
        if self._path(f"hidden_{reached:03}").exists():
            x_BLD = self._load(f"hidden_{reached:03}")
        else:
            x_BLD = stack.embed(self.tokens_BL)
            self._write("hidden_000", x_BLD)
        for _ in range(reached):
            advance()
        for layer_idx in range(reached, top):
            with torch.no_grad(), stack.layer(layer_idx) as layer:
                for part in micro_batches(x_BLD):
                    x_BLD[part] = stack.run(layer, x_BLD[part])
            self._write(f"hidden_{layer_idx + 1:03}", x_BLD)
            advance()
        with stack.head() as head:
            uniform_BL = self._uniform()
            for part in micro_batches(x_BLD):
                grad_TD = head_gradient(head, x_BLD[part].flatten(0, 1), uniform_BL[part].flatten())
                x_BLD[part] = grad_TD.view_as(x_BLD[part])
        self._write(f"grad_{top:03}", x_BLD)
        self._remove(f"hidden_{top:03}")

    def backward(self, advance: Advance) -> None:
        """From the last layer to the first: recompute with gradients, add to the layer's sums."""
        top = self.stack.num_layers
        for layer_idx in reversed(range(top)):
            if self.is_done(layer_idx):
                advance()
                continue
            grad_BLD = self._load(f"grad_{layer_idx + 1:03}")
            x_BLD = self._load(f"hidden_{layer_idx:03}")
            rotation = RotationSums.load(self.workspace.path("rotation", layer_file(layer_idx)))
            leverage_DD = rotation.to(self.stack.device).leverage_DD
            sums = self._sums(layer_idx)
            with self.stack.layer(layer_idx, attention=OBSERVED) as layer:
                observer = FisherObserver(rotation.gamma_NF.to(self.stack.device), self.turn)
                for part in micro_batches(x_BLD):
                    grad_BLD[part] = _backward_step(
                        self.stack, layer, observer, x_BLD[part], grad_BLD[part], sums, leverage_DD
                    )
            # The gradient below first: once the sums are on disk, the one above is no longer needed.
            self._write(f"grad_{layer_idx:03}", grad_BLD)
            held = self.first_sequence + len(self.tokens_BL)
            sums.save(_sums_path(self.workspace, layer_idx), sequences=str(held))
            self._remove(f"grad_{layer_idx + 1:03}")
            self._remove(f"hidden_{layer_idx:03}")
            advance()
        self._remove("grad_000")

    def _uniform(self) -> Tensor:
        """A number in [0, 1) for every position, whatever chunk or process its sequence is in."""
        num_sequences, length = self.tokens_BL.shape
        generators = [sequence_generator(self.seed, self.first_sequence + i) for i in range(num_sequences)]
        rows = [torch.rand(length, generator=generator, dtype=torch.float64) for generator in generators]
        return torch.stack(rows).to(self.stack.device)

    def _sums(self, layer_idx: int) -> LayerSums:
        facts = self.stack.source.facts
        kind = sums_class(facts)
        if self.chunk_idx > 0:
            return kind.load(_sums_path(self.workspace, layer_idx)).to(self.stack.device)
        return kind.zeros(
            hidden_size=facts.hidden_size,
            num_heads=facts.num_attention_heads,
            num_kv_heads=facts.num_key_value_heads,
            head_dim=facts.head_dim,
            device=self.stack.device,
        )

    def _path(self, name: str) -> Path:
        # The chunk is in the name: what a killed run left of one chunk is never taken for the next.
        return _spool_path(self.workspace, f"chunk_{self.chunk_idx:04}_{name}")

    def _write(self, name: str, x_BLD: Tensor) -> None:
        save_tensors(self._path(name), {"x": x_BLD})

    def _load(self, name: str) -> Tensor:
        return _read(self._path(name), self.stack.device)

    def _remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)


def _backward_step(
    stack: LayerStack,
    layer: Any,
    observer: FisherObserver,
    x_BLD: Tensor,
    grad_BLD: Tensor,
    sums: LayerSums,
    leverage_DD: Tensor,
) -> Tensor:
    """One micro-batch through one layer and back; returns the gradient at the layer's input."""
    x_BLD = x_BLD.detach().requires_grad_()
    facts = stack.source.facts
    norms = QkNormObserver(facts.head_dim)
    with (
        torch.enable_grad(),
        observe(layer, observer),
        projection_inputs(layer) as seen,
        nullcontext() if facts.qk_norm is None else norms.watch(layer),
        _unread_output(layer, is_post_norm=facts.is_post_norm),
    ):
        stack.run(layer, x_BLD).backward(grad_BLD)
        seen_BLD = seen.pop()
        sums.add(
            seen_BLD,
            leverage_DD,
            observer.q_energy_NF,
            observer.grad_k_BLGH if facts.qk_norm is None else norms.grad_projected_k_BLGH,
            observer.grad_nope_BLGH,
            observer.grad_v_BLGH,
        )
        if isinstance(sums, QkNormSums):
            sums.add_normed(seen_BLD, norms.q_BLNH, norms.k_BLGH, observer.grad_k_BLGH)
    assert x_BLD.grad is not None
    return x_BLD.grad


@contextmanager
def projection_inputs(layer: Any) -> Iterator[list[Tensor]]:
    """Collect what the layer's attention projections are given, one tensor a call."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach())

    handle = layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


class _OnlyBackward(torch.autograd.Function):
    """A linear map whose output nobody reads, but whose gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, x_XI: Tensor, w_OI: Tensor) -> Tensor:
        ctx.save_for_backward(w_OI)
        return x_XI.new_zeros(()).expand(*x_XI.shape[:-1], w_OI.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (w_OI,) = ctx.saved_tensors
        return grads[0] @ w_OI, None


@contextmanager
def only_backward(linear: nn.Module) -> Iterator[None]:
    """Let a linear map give zeros for the duration of the block; its input's gradient stays right."""
    linear.forward = lambda x_XI: _OnlyBackward.apply(x_XI, linear.weight)
    try:
        yield
    finally:
        del linear.forward


def _unread_output(layer: Any, *, is_post_norm: bool) -> AbstractContextManager[None]:
    """The layer's output is the next one's input, known already: its last product is needed backwards alone.

    Where a norm comes after it, the norm's gradient needs it; experts run as they are.
    """
    down = None if is_post_norm else getattr(layer.mlp, "down_proj", None)
    return nullcontext() if down is None else only_backward(down)


def sequence_generator(seed: int, sequence_idx: int) -> torch.Generator:
    """The random numbers of one sequence, whatever chunk or process it is in."""
    return torch.Generator().manual_seed((seed * 1_000_003 + sequence_idx) & 0x7FFF_FFFF_FFFF)


def head_gradient(head: nn.Sequential, x_TD: Tensor, uniform_T: Tensor) -> Tensor:
    """Gradient at the last hidden states of the summed cross-entropy with labels sampled from the model.

    Sampling from the model, not the text's own next token, makes the second moment of the gradients the
    Fisher information. One uniform number per position picks the label.
    """
    norm, projection = head
    grads = []
    for rows_TD, rows_T in zip(x_TD.split(HEAD_ROWS), uniform_T.split(HEAD_ROWS), strict=True):
        rows_TD = rows_TD.detach().requires_grad_()
        with torch.enable_grad():
            normed_TD = norm(rows_TD)
        with torch.no_grad():
            # Cross-entropy's gradient at the logits: the probabilities, less one at the label.
            grad_TS = projection(normed_TD).softmax(-1)
            labels_T1 = draw(grad_TS, rows_T)[:, None]
            grad_TS.scatter_add_(1, labels_T1, grad_TS.new_full((1, 1), -1.0).expand_as(labels_T1))
            grad_normed_TD = grad_TS @ projection.weight
        normed_TD.backward(grad_normed_TD)
        assert rows_TD.grad is not None
        grads.append(rows_TD.grad)
    return torch.cat(grads)


def _sums_path(workspace: Workspace, layer_idx: int) -> Path:
    return workspace.path("statistics", layer_file(layer_idx))


def _sequences_in(workspace: Workspace, layer_idx: int) -> int:
    """How many of the sequences, in order, a layer's sums hold."""
    return int(marks(_sums_path(workspace, layer_idx)).get("sequences", 0))


def _spool_path(workspace: Workspace, name: str) -> Path:
    return workspace.path("spool", f"{name}.safetensors")


def _read(path: Path, device: torch.device) -> Tensor:
    return load_file(path, device=str(device))["x"]
