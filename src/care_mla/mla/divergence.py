"""How far converted candidates are from the original on given text, one decoder layer in memory at a time.

Candidates run side by side through the source's own layers, each with its latent attention in place of
`self_attn`, so no converted model is ever held whole: this chooses P, freqfold and allocation in `convert`,
and is the evaluator of `compare`.
"""
# Shapes: B sequences, L positions, D hidden_size, S vocabulary.

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from care_mla.calibrate.layers import LayerStack
from care_mla.factors import LatentLayer
from care_mla.mla.mapping import LatentDims, attention_module, latent_config

HEAD_ROWS = 512
Candidate = Callable[[int], LatentLayer]


@dataclass(frozen=True)
class Divergence:
    """Sums over predicted tokens: negative log-likelihood and KL(original || candidate), in nats."""

    tokens: int
    nll: float
    kl: float

    @property
    def perplexity(self) -> float:
        return float(torch.tensor(self.nll / self.tokens, dtype=torch.float64).exp())

    @property
    def mean_kl(self) -> float:
        return self.kl / self.tokens


def measure(
    stack: LayerStack,
    candidates: Mapping[str, Candidate],
    tokens_BL: Tensor,
    advance: Callable[[], None] = lambda: None,
) -> tuple[Divergence, dict[str, Divergence]]:
    """Perplexity of the original, and perplexity and KL of each candidate, on packed blocks.

    Each block predicts its L - 1 last tokens from those before them.

    Args:
        candidates: by name, a function from layer index to the converted layer; called once a layer.
        tokens_BL: token ids.
        advance: called after each layer, and once after the head.
    """
    original_BLD = stack.embed(tokens_BL)
    streams = dict.fromkeys(candidates, original_BLD)
    for layer_idx in range(stack.num_layers):
        with torch.no_grad(), stack.layer(layer_idx) as layer:
            original = layer.get_submodule("self_attn")
            original_BLD = _run(stack, layer, original_BLD)
            for name, candidate in candidates.items():
                layer.self_attn = stand_in(stack, layer_idx, candidate(layer_idx), original)
                streams[name] = _run(stack, layer, streams[name])
            layer.self_attn = original
        advance()
    with torch.no_grad(), stack.head() as head:
        result = _compare_heads(head, original_BLD, streams, tokens_BL)
    advance()
    return result


def stand_in(stack: LayerStack, layer_idx: int, latent: LatentLayer, original: nn.Module) -> nn.Module:
    """Latent attention in place of `self_attn`; its output projection is the original's or its own."""
    facts = stack.source.facts
    config = latent_config(facts, [LatentDims.of(latent)] * facts.num_hidden_layers)
    output = original.get_submodule("o_proj")
    assert isinstance(output, nn.Linear)
    latent = latent.to(stack.device)
    weight_DO = latent.output_weight(output.weight).to(output.weight)
    return attention_module(config, layer_idx, latent, weight_DO, output.bias)


def _run(stack: LayerStack, layer: nn.Module, x_BLD: Tensor) -> Tensor:
    return torch.cat([stack.run(layer, x_1LD) for x_1LD in x_BLD.split(1)])


def _compare_heads(
    head: nn.Module, original_BLD: Tensor, streams: Mapping[str, Tensor], tokens_BL: Tensor
) -> tuple[Divergence, dict[str, Divergence]]:
    num_blocks, length = tokens_BL.shape
    tokens = num_blocks * (length - 1)
    original_nll = 0.0
    nll = dict.fromkeys(streams, 0.0)
    kl = dict.fromkeys(streams, 0.0)
    for b in range(num_blocks):
        for rows_T in torch.arange(length - 1).split(HEAD_ROWS):
            targets_T1 = tokens_BL[b, rows_T + 1, None].to(original_BLD.device)
            original_TS = head(original_BLD[b, rows_T]).float().log_softmax(-1)
            original_nll -= original_TS.gather(1, targets_T1).double().sum().item()
            probs_TS = original_TS.exp()
            for name, x_BLD in streams.items():
                log_TS = head(x_BLD[b, rows_T]).float().log_softmax(-1)
                nll[name] -= log_TS.gather(1, targets_T1).double().sum().item()
                kl[name] += (probs_TS * (original_TS - log_TS)).sum(-1).double().sum().item()
    measured = {name: Divergence(tokens, nll[name], kl[name]) for name in streams}
    return Divergence(tokens, original_nll, 0.0), measured
