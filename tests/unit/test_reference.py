"""The reference forward: the stock model where nothing is converted, our own class where something is."""
# Shapes: see care_mla/mla/reference.py.

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from care_mla.checkpoint.opening import open_source
from care_mla.checkpoint.source import Source
from care_mla.errors import UnsupportedModelError
from care_mla.mla.reference import Reference
from export_cases import decoupled_layer, relative_error, token_ids
from latent_models import FORMS, converted, exact_layer, load, partial_layer, random_layer

from pico import pico_model

SOURCES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases-untied-llama3": {
        "attention_bias": True, "mlp_bias": True, "tied": False, "rope": "llama3", "rms_norm_eps": 1e-6,
    },
    "llama-one-kv-head": {"kv_heads": 1},
    "yarn": {"rope": "yarn"},
    "longrope": {"rope": "longrope"},
    "linear": {"rope": "linear"},
    "mistral-window": {"family": "mistral", "sliding_window": 6, "tied": False},
    "mixtral": {"family": "mixtral", "sliding_window": 6},
    "phi3": {"family": "phi3", "tied": False},
    "phi3-partial": {
        "family": "phi3",
        "rope": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
    },
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "attention_bias": True},
    "olmo2": {"family": "olmo2", "tied": False},
}  # fmt: skip


WITHOUT_QK_NORM = ("llama-biases-untied-llama3", "mistral-window", "qwen2")


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path) -> Source:
    return open_source(str(pico_model(tmp_path / "source", tokenizer=False, **SOURCES[request.param])))


def stock(source: Source) -> PreTrainedModel:
    """The source in transformers, in float64, which its grouped kernels for experts do not know."""
    return AutoModelForCausalLM.from_pretrained(
        source.name, dtype=torch.float64, experts_implementation="eager"
    )


@torch.no_grad()
def test_original_is_the_stock_model(source: Source) -> None:
    model = stock(source)
    tokens_BL = token_ids()
    logits_BLS = Reference(source, None).logits(tokens_BL)
    assert logits_BLS.dtype == torch.float64
    assert relative_error(logits_BLS, model(tokens_BL).logits) < 1e-6


@torch.no_grad()
def test_greedy_is_the_stock_models(source: Source) -> None:
    model = stock(source)
    prompt_L = token_ids()[0]
    found = Reference(source, None).greedy(prompt_L, 8)
    tokens_L = prompt_L
    for token in found.tokens_T:
        assert model(tokens_L[None]).logits[0, -1].argmax() == token
        tokens_L = torch.cat((tokens_L, token[None]))
    again_BLS = Reference(source, None).logits(tokens_L[None, :-1])
    assert relative_error(found.logits_TS, again_BLS[0, -8:]) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name",
    ["llama", "llama-biases-untied-llama3", "mistral-window", "qwen2", "olmo2", "yarn", "longrope"],
)
def test_latent_layers_are_our_own_class(form: str, name: str, tmp_path) -> None:
    source = open_source(str(pico_model(tmp_path / "source", tokenizer=False, **SOURCES[name])))
    layers = [random_layer(form, 20, 0), random_layer(form, 12, 1)]
    model = converted(load(tmp_path / "source"), layers).double()
    tokens_BL = token_ids()
    logits_BLS = Reference(source, layers.__getitem__).logits(tokens_BL)
    assert relative_error(logits_BLS, model(tokens_BL).logits) < 2e-6


@torch.no_grad()
@pytest.mark.parametrize(
    ("full_rank", "name"),
    [
        *((build, name) for build in (exact_layer, partial_layer) for name in WITHOUT_QK_NORM),
        (exact_layer, "qwen3"),
        (exact_layer, "olmo2"),
    ],
)
def test_full_rank_is_the_original(full_rank, name: str, tmp_path) -> None:
    source = open_source(str(pico_model(tmp_path / "source", tokenizer=False, **SOURCES[name])))
    model = load(tmp_path / "source")
    found = Reference(source, lambda i: full_rank(model, i))
    expected = Reference(source, None)
    tokens_BL = token_ids()
    assert relative_error(found.logits(tokens_BL), expected.logits(tokens_BL)) < 1e-6
    assert (
        found.greedy(tokens_BL[0], 6).tokens_T.tolist() == expected.greedy(tokens_BL[0], 6).tokens_T.tolist()
    )


def test_greedy_of_latent_layers_recomputes(tmp_path) -> None:
    source = open_source(str(pico_model(tmp_path / "source", tokenizer=False)))
    reference = Reference(source, lambda i: decoupled_layer(source, i))
    prompt_L = token_ids()[0]
    found = reference.greedy(prompt_L, 6)
    whole_L = torch.cat((prompt_L, found.tokens_T[:-1]))
    assert relative_error(found.logits_TS, reference.logits(whole_L[None])[0, -6:]) < 1e-12


@torch.no_grad()
def test_slice_is_a_shallower_model(tmp_path) -> None:
    source = open_source(str(pico_model(tmp_path / "source", tokenizer=False, layers=3)))
    model = stock(source)
    model.model.layers = model.model.layers[:2]
    tokens_BL = token_ids()
    logits_BLS = Reference(source, None, num_layers=2).logits(tokens_BL)
    assert relative_error(logits_BLS, model(tokens_BL, use_cache=False).logits) < 1e-6


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_streamed_weights_give_the_same_logits(family: str, tmp_path) -> None:
    source = open_source(str(pico_model(tmp_path / "source", family, tokenizer=False, dtype=torch.bfloat16)))
    asked: list[int] = []

    def layer(layer_idx: int):
        asked.append(layer_idx)
        return decoupled_layer(source, layer_idx)

    held, streamed = (Reference(source, layer, memory_bytes=size) for size in (2**30, 0))
    tokens_BL = token_ids()
    for reference, expected in ((held, [0, 1]), (streamed, [0, 1, 0, 1])):
        asked.clear()
        first_BLS, second_BLS = reference.logits(tokens_BL), reference.logits(tokens_BL)
        assert asked == expected
        assert torch.equal(first_BLS, second_BLS)
        assert torch.equal(first_BLS, held.logits(tokens_BL))


def test_other_activations_are_refused(tmp_path) -> None:
    source = open_source(str(pico_model(tmp_path / "source", tokenizer=False)))
    source.facts = replace(source.facts, config=source.facts.config | {"hidden_act": "gelu"})
    with pytest.raises(UnsupportedModelError, match="'gelu'"):
        Reference(source, None)
