"""Calibration text that the source model writes itself: no corpus, nothing to download, nothing leaked.

Needs the whole model in memory; the plan says beforehand whether it fits.
"""
# Shapes: B sequences, L positions, S vocabulary.

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from care_mla.calibrate.layers import source_config
from care_mla.checkpoint.spelling import module_tensors

if TYPE_CHECKING:
    from care_mla.checkpoint.source import Source

RUN = 256  # ids of a vocabulary that `draw` takes together
# At 1 a small model soon wanders off: the demo model finds text of its own as surprising as a perplexity of
# 56, natural text 29. At 0.9 its text has 20, and one of 0.8 (6) repeats itself; conversions are best at 0.9.
TEMPERATURE = 0.9
# Without cuDNN's attention, which makes a plan for every length anew: 60 % of the time on an H100.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def load_model(
    source: Source, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The whole source model as its stock class, for what cannot be done layer by layer."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source_config(source), dtype=dtype)
    facts = source.facts
    model.load_state_dict(
        {
            name: source.tensor(name).to(device, dtype)
            for name in source.names()
            if not name.startswith("model.layers.")
        },
        assign=True,
        strict=False,
    )
    for layer_idx, layer in enumerate(model.model.layers):
        weights = {name: tensor.to(device, dtype) for name, tensor in source.layer(layer_idx).items()}
        layer.load_state_dict(module_tensors(facts, layer_idx, weights), assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert not left, f"never filled: {left}"
    return model.eval().requires_grad_(False)


def sample_sequences(
    model: PreTrainedModel,
    *,
    start_token: int,
    num_sequences: int,
    length: int,
    seed: int,
    first_sequence: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Tensor:
    """Token ids (B, L) drawn from the model at TEMPERATURE, after the start token, which comes first.

    An end-of-text token inside a sequence stays there and the model goes on, as in packed text. Sequence i
    draws from a generator of its own, keyed by (seed, first_sequence + i).
    """
    device = next(model.parameters()).device
    uniform_BL = torch.stack(
        [
            torch.rand(length, generator=_generator(seed, first_sequence + i), dtype=torch.float64)
            for i in range(num_sequences)
        ]
    ).to(device)
    tokens_BL = torch.full((num_sequences, length), start_token, device=device)
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer(length) for _ in range(model.config.num_hidden_layers)]
    cached = {cache_argument(model): cache}
    for position in range(length - 1):
        with torch.no_grad(), sdpa_kernel(ATTENTION):
            output = model(tokens_BL[:, position : position + 1], use_cache=True, **cached)
        probs_BS = (output.logits[:, -1].float() / TEMPERATURE).softmax(-1)
        tokens_BL[:, position + 1] = draw(probs_BS, uniform_BL[:, position])
        advance()
    return tokens_BL.cpu()


class _RoomyLayer(DynamicLayer):
    """Keys and values with room for all positions; the stock layer copies all of them at every token."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            batch, num_groups, _, head_dim = key_states.shape
            self.room = [key_states.new_empty(batch, num_groups, self.length, head_dim) for _ in range(2)]
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        for room_BGLH, states in zip(self.room, (key_states, value_states), strict=True):
            room_BGLH[:, :, begin:end] = states
        self.keys, self.values = (room_BGLH[:, :, :end] for room_BGLH in self.room)
        return self.keys, self.values


def draw(probs_TS: Tensor, uniform_T: Tensor) -> Tensor:
    """One token id per row, drawn by inverting the distribution function at a uniform number (float64).

    In two stages, first a run of `RUN` ids and then one of them, since a running sum over a whole vocabulary
    is slow.
    """
    whole = probs_TS.shape[1] // RUN * RUN
    runs_TX = torch.cat(
        [
            probs_TS[:, :whole].unflatten(1, (-1, RUN)).sum(-1, dtype=torch.float64),
            probs_TS[:, whole:].sum(-1, keepdim=True, dtype=torch.float64),
        ],
        dim=1,
    )
    run_T1, rest_T1 = _invert(runs_TX, uniform_T[:, None])
    ids_TX = run_T1 * RUN + torch.arange(RUN, device=probs_TS.device)
    in_run_TX = probs_TS.gather(1, ids_TX.clamp_max(probs_TS.shape[1] - 1))
    in_run_TX.masked_fill_(ids_TX >= probs_TS.shape[1], 0.0)
    token_T1, _ = _invert(in_run_TX, rest_T1)
    return (run_T1 * RUN + token_T1)[:, 0]


def _invert(weight_TX: Tensor, uniform_T1: Tensor) -> tuple[Tensor, Tensor]:
    """Index in each row where the running sum passes a share of the total, and the share within it."""
    cumulative_TX = weight_TX.double().cumsum(-1)
    reached_T1 = uniform_T1 * cumulative_TX[:, -1:]
    # To the right: an id of probability zero is never the first to pass.
    index_T1 = torch.searchsorted(cumulative_TX, reached_T1, right=True).clamp_max_(weight_TX.shape[1] - 1)
    own_T1 = weight_TX.gather(1, index_T1).double()
    before_T1 = cumulative_TX.gather(1, index_T1) - own_T1
    return index_T1, ((reached_T1 - before_T1) / own_T1).clamp(0, 1 - 2**-53)


def cache_argument(model: PreTrainedModel) -> str:
    """Its name: transformers renamed the cache argument within the versions that we support."""
    return "cache" if "cache" in inspect.signature(model.model.forward).parameters else "past_key_values"


def _generator(seed: int, sequence_idx: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + sequence_idx) ^ 0x5E1F)
