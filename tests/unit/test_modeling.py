"""Our latent-attention class against the source's attention, a slow formula, and itself by every path."""
# Shapes: see care_mla/mla/latent_attention.py.

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, PreTrainedModel, StaticCache

from care_mla.errors import UnsupportedModelError
from care_mla.factors import LatentLayer
from care_mla.mla.mapping import (
    LatentDims,
    attention_module,
    latent_config,
)
from latent_models import (
    FORMS,
    NORMED_SOURCES,
    SOURCES,
    D,
    G,
    H,
    N,
    converted,
    exact_layer,
    facts_of,
    load,
    partial_layer,
    random_layer,
    random_model,
)

from pico import pico_model

EPS = 1e-5  # of the pico models


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory) -> PreTrainedModel:
    folder = tmp_path_factory.mktemp("source") / "model"
    return load(pico_model(folder, tokenizer=False, **SOURCES[request.param]))


@pytest.fixture(scope="module", params=NORMED_SOURCES)
def normed_source(request, tmp_path_factory) -> PreTrainedModel:
    folder = tmp_path_factory.mktemp("source") / "model"
    return load(pico_model(folder, tokenizer=False, **NORMED_SOURCES[request.param]))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> PreTrainedModel:
    return load(pico_model(tmp_path_factory.mktemp("llama") / "model", tokenizer=False))


@pytest.fixture
def ids(llama) -> Tensor:
    return torch.randint(2, llama.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))


def slow_attention(layer: LatentLayer, x_LD: Tensor, positions: list[int]) -> Tensor:
    """The docstring of LatentLayer in float64, one query, head and key at a time: (L, N, H)."""
    layer, x_LD = layer.to(dtype=torch.float64), x_LD.double()

    def turn(vector: Tensor, inv_freq: Tensor, position: int) -> Tensor:
        half = len(vector) // 2
        turned = torch.complex(vector[:half], vector[half:]) * torch.exp(1j * inv_freq * position)
        return torch.cat((turned.real, turned.imag))

    def add(vector: Tensor, bias: Tensor | None, head: int) -> Tensor:
        return vector if bias is None else vector + bias[head]

    def normed(vectors: list[Tensor], weight_XH: Tensor | None) -> list[Tensor]:
        """All heads of one token: each by itself with one row of weights, together with a row for each."""
        if weight_XH is None:
            return vectors
        if len(weight_XH) == 1:
            return [weight_XH[0] * v / (v @ v / H + EPS).sqrt() for v in vectors]
        square = sum(v @ v for v in vectors) / (len(vectors) * H)
        return [weight * v / (square + EPS).sqrt() for weight, v in zip(weight_XH, vectors, strict=True)]

    def all_keys(x: Tensor) -> list[Tensor]:
        latent = layer.down_RD @ x
        keys = [add(layer.up_k_GMR[g] @ latent, layer.k_bias_GM, g) for g in range(G)]
        return normed(keys, layer.k_norm_XH)

    def all_queries(x: Tensor) -> list[Tensor]:
        queries = [add(layer.q_rope_NPD[n] @ x, layer.q_rope_bias_NP, n) for n in range(N)]
        return normed(queries, layer.q_norm_XH)

    out = torch.zeros(len(x_LD), N, H, dtype=torch.float64)
    for n in range(N):
        g = n * G // N
        table = layer.inv_freq_JF[min(g, len(layer.inv_freq_JF) - 1)]
        keys, values = [], []
        for s, x in zip(positions, x_LD, strict=True):
            latent = layer.down_RD @ x
            key = all_keys(x)[g]
            if layer.k_rope_JPD is None:
                key = turn(key, table, s)
            else:
                j = min(g, len(layer.k_rope_JPD) - 1)
                key = torch.cat((key, turn(add(layer.k_rope_JPD[j] @ x, layer.k_rope_bias_JP, j), table, s)))
            keys.append(key)
            values.append(add(layer.up_v_GHR[g] @ latent, layer.v_bias_GH, g))
        for t, (position, x) in enumerate(zip(positions, x_LD, strict=True)):
            query = turn(all_queries(x)[n], table, position)
            if layer.q_nope_NMD is not None:
                query = torch.cat((add(layer.q_nope_NMD[n] @ x, layer.q_nope_bias_NM, n), query))
            scores = torch.stack([query @ key for key in keys[: t + 1]]) / H**0.5
            out[t, n] = scores.softmax(0) @ torch.stack(values[: t + 1])
    return out


@torch.no_grad()
def token_by_token(
    model: PreTrainedModel, ids: Tensor, prefill: int = 1, cache: Any = None
) -> tuple[Tensor, Any]:
    """Logits at every position, and the cache that held the past."""
    name = cache_name()
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits = [model(ids[:, :prefill], use_cache=True, **{name: cache}).logits]
    logits += [
        model(ids[:, t : t + 1], use_cache=True, **{name: cache}).logits for t in range(prefill, ids.shape[1])
    ]
    return torch.cat(logits, dim=1), cache


def cache_name() -> str:
    from inspect import signature

    forward = signature(transformers.LlamaForCausalLM.forward).parameters
    return "cache" if "cache" in forward else "past_key_values"


@torch.no_grad()
@pytest.mark.parametrize("build", [exact_layer, partial_layer])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_full_rank_is_the_source(source, ids, build, attn_implementation):
    source = copy.deepcopy(source)
    source.set_attn_implementation(attn_implementation)
    model = converted(source, [build(source, i) for i in range(2)])
    model.set_attn_implementation(attn_implementation)
    expected = source(ids).logits
    assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert_close(token_by_token(model, ids, prefill=5)[0], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_full_rank_with_qk_norm_is_the_source(normed_source, ids, attn_implementation):
    test_full_rank_is_the_source(normed_source, ids, exact_layer, attn_implementation)


@torch.no_grad()
def test_full_rank_with_qk_norm_generates_the_sources_text(normed_source, ids):
    model = converted(normed_source, [exact_layer(normed_source, i) for i in range(2)])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(model.generate(ids, **options), normed_source.generate(ids, **options))


@torch.no_grad()
def test_module_with_qk_norm_stands_in_for_the_sources_attention(normed_source, ids):
    test_module_stands_in_for_the_sources_attention(normed_source, ids, exact_layer)


@torch.no_grad()
@pytest.mark.parametrize("build", [exact_layer, partial_layer])
def test_module_stands_in_for_the_sources_attention(source, ids, build):
    expected = source(ids).logits
    hybrid = copy.deepcopy(source)
    layers = [build(source, i) for i in range(2)]
    config = latent_config(facts_of(source), layers)
    for layer_idx, layer in enumerate(layers):
        o_proj = source.model.layers[layer_idx].self_attn.o_proj
        hybrid.model.layers[layer_idx].self_attn = attention_module(
            config, layer_idx, layer, o_proj.weight, o_proj.bias
        )
    for attn_implementation in ("sdpa", "eager"):
        hybrid.set_attn_implementation(attn_implementation)
        assert_close(hybrid(ids).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("biases", [True, False])
def test_attention_is_its_formula(llama, form, biases):
    layers = [random_layer(form, 20, 0, biases=biases), random_layer(form, 12, 1, biases=biases)]
    config = latent_config(facts_of(llama), layers)
    o_weight = torch.eye(D)
    x_LD = torch.randn(7, D, generator=torch.Generator().manual_seed(2))
    for layer_idx, layer in enumerate(layers):
        module = attention_module(config, layer_idx, layer, o_weight)
        out, _ = module(x_LD[None], position_ids=torch.arange(3, 10)[None])
        assert_close(
            out[0].double(), slow_attention(layer, x_LD, list(range(3, 10))).flatten(1), atol=2e-5, rtol=1e-4
        )
        restarted = [0, 1, 2, 3, 0, 1, 2]
        out, _ = module(x_LD[None], position_ids=torch.tensor([restarted]))
        assert_close(out[0].double(), slow_attention(layer, x_LD, restarted).flatten(1), atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_paths_agree(llama, ids, form, attn_implementation):
    model = random_model(llama, form)
    model.set_attn_implementation(attn_implementation)
    expected = model(ids, use_cache=False).logits
    for prefill in (1, 5, 19):
        assert_close(token_by_token(model, ids, prefill)[0], expected, atol=2e-5, rtol=1e-4)
    name, cache = cache_name(), DynamicCache(config=model.config)
    chunks = [model(chunk, use_cache=True, **{name: cache}).logits for chunk in ids.split(7, dim=1)]
    assert_close(torch.cat(chunks, dim=1), expected, atol=2e-5, rtol=1e-4)
    # A preallocated cache returns slots that are still empty.
    static = StaticCache(config=model.config, max_cache_len=32)
    assert_close(token_by_token(model, ids, 5, static)[0], expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("form", ["decoupled", "partial-rope"])
def test_absorbed_decode_is_what_runs_and_equals_the_plain_path(llama, ids, form, monkeypatch):
    model = random_model(llama, form)
    plain = copy.deepcopy(model)
    for layer in plain.model.layers:
        monkeypatch.setattr(layer.self_attn, "_can_absorb", lambda latent: False)
    # Rebuilding keys during decode would call k_b_proj with the whole cache.
    calls = []
    model.model.layers[0].self_attn.k_b_proj.register_forward_hook(
        lambda *args: calls.append(args[1][0].shape)
    )
    assert_close(token_by_token(model, ids, 5)[0], token_by_token(plain, ids, 5)[0], atol=2e-5, rtol=1e-4)
    assert calls == [(2, 5, 20)]


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_generate_equals_recomputation(llama, ids, form):
    model = random_model(llama, form)
    out = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=1)
    logits = model(out, use_cache=False).logits
    logits[:, :, model.generation_config.eos_token_id] = -torch.inf
    assert torch.equal(out[:, 20:], logits[:, 19:-1].argmax(-1))
    beams = model.generate(ids, max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=1)
    uncached = model.generate(
        ids, max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=1, use_cache=False
    )
    assert torch.equal(beams, uncached)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_left_padding_is_each_row_alone(llama, ids, form, attn_implementation):
    model = random_model(llama, form)
    model.set_attn_implementation(attn_implementation)
    pads = 6
    padded = ids.clone()
    padded[1, :pads] = 1
    mask = torch.ones_like(padded)
    mask[1, :pads] = 0
    alone = [model(ids[:1]).logits[0], model(ids[1:, pads:]).logits[0]]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    new = [model.generate(row[None], **options)[0, len(row) :] for row in (ids[0], ids[1, pads:])]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for options_together in ({}, {"position_ids": positions}):
        together = model(padded, attention_mask=mask, **options_together).logits
        assert_close(together[0], alone[0], atol=2e-5, rtol=1e-4)
        assert_close(together[1, pads:], alone[1], atol=2e-5, rtol=1e-4)
    out = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(out[:, 20:], torch.stack(new))


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_right_padding_is_each_row_alone(llama, ids, form):
    model = random_model(llama, form)
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0
    positions = (mask.cumsum(-1) - 1) * mask
    together = model(ids, attention_mask=mask, position_ids=positions).logits
    assert_close(together[1, :14], model(ids[1:, :14]).logits[0], atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [None, 6])
def test_cache_holds_what_the_plan_counts(tmp_path, form, window, ids):
    source = load(pico_model(tmp_path / "model", "mistral", tokenizer=False, sliding_window=window))
    layers = [random_layer(form, 20, 0), random_layer(form, 12, 1)]
    model = converted(source, layers)
    _, cache = token_by_token(model, ids, 5)
    held = min(ids.shape[1], (window or 1000) - 1)
    for cached, layer in zip(cache.layers, layers, strict=True):
        nbytes = sum(t.numel() * t.element_size() for t in (cached.keys, cached.values))
        assert nbytes == ids.shape[0] * held * layer.cached_values * 4
    expected = model(ids, use_cache=False).logits
    assert_close(token_by_token(model, ids, 5)[0], expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_cache_can_be_cropped_and_reordered(llama, ids, form):
    model = random_model(llama, form)
    _, cache = token_by_token(model, ids, 5)
    cache.crop(-8)
    cache.reorder_cache(torch.tensor([1, 0]))
    logits = model(ids[[1, 0], 12:], use_cache=True, **{cache_name(): cache}).logits
    assert_close(logits, model(ids[[1, 0]]).logits[:, 12:], atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_keeps_frequencies_in_float32(llama, ids, form, tmp_path):
    model = random_model(llama, form)
    expected = model(ids).logits
    table = model.model.layers[0].self_attn.inv_freq.clone()
    model.save_pretrained(tmp_path)
    cast = copy.deepcopy(model).to(torch.bfloat16)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for half in (cast, loaded):
        attention = half.model.layers[0].self_attn
        assert attention.q_proj.weight.dtype == torch.bfloat16
        assert attention.inv_freq.dtype == torch.float32
        assert torch.equal(attention.inv_freq, table)
        error = (half(ids).logits.float() - expected).norm() / expected.norm()
        assert error < 0.05
        step, _ = token_by_token(half, ids, 5)
        assert (step.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("form", FORMS)
def test_save_and_load_are_lossless(source, ids, form, tmp_path):
    model = random_model(source, form)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tied = source.config.tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded.config.kv_lora_rank == [20, 12]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("form", FORMS)
def test_backward_and_gradient_checkpointing(llama, ids, form):
    model = random_model(llama, form).train()
    model(ids, labels=ids).loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(g.isfinite().all() for g in grads.values())
    # Softmax drops what is the same for every key, so only that gradient is zero.
    assert all(g.norm() > 1e-7 for name, g in grads.items() if "k_b_proj.bias" not in name)
    model.zero_grad()
    # Renamed between the versions that are tested.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(ids, labels=ids).loss.backward()
    assert_close({n: p.grad for n, p in model.named_parameters()}, grads, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_attentions_are_recorded(llama, ids):
    model = random_model(llama, "decoupled")
    model.set_attn_implementation("eager")
    out = model(ids, output_attentions=True, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert [a.shape for a in out.attentions] == [(2, N, 20, 20)] * 2
    assert_close(out.attentions[0].sum(-1), torch.ones(2, N, 20))


def test_backends_that_cannot_run_are_refused(llama):
    model = random_model(llama, "decoupled")
    with pytest.raises(ValueError, match="flex"):
        model.set_attn_implementation("flex_attention")


def test_what_cannot_be_expressed_is_refused_by_name(llama):
    facts = facts_of(llama)
    dims = [LatentDims.of(random_layer("decoupled", 8, 0))] * 2
    with pytest.raises(UnsupportedModelError, match="Gemma2ForCausalLM"):
        latent_config(replace(facts, architecture="Gemma2ForCausalLM"), dims)
    config = latent_config(facts, dims).to_dict()
    with pytest.raises(ValueError, match="latent_form is 'rotated'"):
        type(latent_config(facts, dims)).from_dict(config | {"latent_form": "rotated"})
    with pytest.raises(ValueError, match="3 ranks for 2 layers"):
        type(latent_config(facts, dims)).from_dict(config | {"kv_lora_rank": [8, 8, 8]})


def test_oldest_supported_transformers():
    """This file and test_export_hf.py under transformers 5.17, where the cache argument has another name."""
    folder = os.environ.get("CARE_TRANSFORMERS_517")
    if folder is None:
        pytest.skip("set CARE_TRANSFORMERS_517 to a folder that holds transformers 5.17; `make test` does")
    # Not asked of the module: importing it would import one of pytest's plugins before pytest does.
    run = (
        "import sys, pytest; from importlib.metadata import version;"
        "assert version('transformers').startswith('5.17.'); sys.exit(pytest.main(sys.argv[1:]))"
    )
    here = Path(__file__)
    files = [str(here), str(here.with_name("test_export_hf.py"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", run, "-x", "-p", "no:cacheprovider", "-k", "not oldest_supported", *files],
        env=environment, capture_output=True, text=True, check=False, cwd=here.parent.parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
