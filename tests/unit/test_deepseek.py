"""The `deepseek-v3` profile: stock DeepSeek-V3 gives the reference's logits, and the rest is refused."""
# Shapes: see care_mla/export/deepseek.py.

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM

from care_mla.checkpoint.opening import open_source
from care_mla.checkpoint.source import Source, TensorHeader
from care_mla.errors import ExportError
from care_mla.export.deepseek import (
    attention_tensors,
    check_deepseek,
    deepseek_config,
    neighbour_pairs,
    write_deepseek_checkpoint,
)
from care_mla.export.latent_norm import MAX_RMS, latent_norm
from care_mla.export.residual import residual_factor, residual_scale
from care_mla.factors import LatentLayer
from care_mla.families import rotary_frequencies
from care_mla.mla.mapping import LatentDims
from care_mla.mla.reference import Reference
from care_mla.profiles import profile_blocker
from export_cases import decoupled_layer, relative_error, token_ids
from latent_models import random_layer

from pico import pico_model

CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-untied-eps-1e-6": {"tied": False, "rms_norm_eps": 1e-6},
    "llama-one-kv-head-untied": {"kv_heads": 1, "tied": False},
    "llama-mha": {"kv_heads": 4},
    "llama3-rope": {"rope": "llama3"},
    "yarn": {"rope": "yarn"},
    "longrope": {"rope": "longrope"},
    "linear": {"rope": "linear"},
    "qwen2-yarn": {"family": "qwen2", "rope": "yarn"},
    "llama-biases": {"attention_bias": True},
    "mistral": {"family": "mistral", "tied": False, "head_dim": 32},
    "mistral-window-beyond-its-positions": {"family": "mistral", "sliding_window": 1024},
    "qwen2": {"family": "qwen2", "rms_norm_eps": 1e-6},
    "qwen2-untied-eps-1e-5": {"family": "qwen2", "tied": False},
}


def source_of(tmp_path, **options: Any) -> Source:
    return open_source(str(pico_model(tmp_path / "source", **options)))


def load_stock(folder, dtype: torch.dtype = torch.float32) -> DeepseekV3ForCausalLM:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert type(model) is DeepseekV3ForCausalLM
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_stock_class_gives_the_references_logits(name: str, tmp_path) -> None:
    source = source_of(tmp_path, tokenizer=False, **CASES[name])
    layers = [decoupled_layer(source, seed) for seed in range(2)]
    out = tmp_path / "out"
    summary = write_deepseek_checkpoint(source, layers.__getitem__, out, torch.float32)
    tokens_BL = token_ids()
    expected_BLS = Reference(source, layers.__getitem__).logits(tokens_BL)
    model = load_stock(out)
    assert relative_error(model(tokens_BL).logits, expected_BLS) < 1e-5
    assert model.config.rms_norm_eps == 1e-6
    assert model.config.attention_bias is source.facts.v_bias
    assert summary["q_lora_rank"] == (65 if source.facts.q_bias else None)
    assert summary["cached_values"] == layers[0].cached_values
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "vocab_size"):
        assert getattr(model.config, key) == getattr(
            AutoModelForCausalLM.from_pretrained(source.name).config, key
        )


@torch.no_grad()
def test_one_bias_alone_is_kept(tmp_path) -> None:
    source = source_of(tmp_path, tokenizer=False)
    layers = [decoupled_layer(source, seed) for seed in range(2)]
    layers[1] = replace(layers[1], v_bias_GH=torch.randn(2, 16, dtype=torch.float64))
    summary = write_deepseek_checkpoint(source, layers.__getitem__, tmp_path / "out", torch.float32)
    assert summary["q_lora_rank"] is None
    expected_BLS = Reference(source, layers.__getitem__).logits(token_ids())
    assert relative_error(load_stock(tmp_path / "out")(token_ids()).logits, expected_BLS) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_bfloat16_differs_by_its_rounding(name: str, tmp_path) -> None:
    source = source_of(tmp_path, tokenizer=False, **CASES[name])
    layers = [decoupled_layer(source, seed) for seed in range(2)]
    write_deepseek_checkpoint(source, layers.__getitem__, tmp_path / "out", torch.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    expected_BLS = Reference(source, layers.__getitem__).logits(token_ids())
    for dtype in (torch.float32, torch.bfloat16):
        assert relative_error(load_stock(tmp_path / "out", dtype)(token_ids()).logits, expected_BLS) < 5e-2


@torch.no_grad()
def test_norm_is_linear_for_every_token(tmp_path) -> None:
    source = source_of(tmp_path, tokenizer=False)
    layers = [decoupled_layer(source, seed) for seed in range(2)]
    summary = write_deepseek_checkpoint(source, layers.__getitem__, tmp_path / "out", torch.float32)
    model, largest = load_stock(tmp_path / "out"), []

    def latent_rms(module: torch.nn.Module, inputs: tuple[Tensor], output_BLR: Tensor) -> None:
        largest.append((inputs[0].square().mean(-1).sqrt().max(), output_BLR.square().mean().sqrt()))

    for layer in model.model.layers:
        layer.self_attn.kv_a_layernorm.register_forward_hook(latent_rms)
    model(torch.arange(320)[None])
    for (before, after), norm in zip(largest, summary["latent_norms"], strict=True):
        assert 0 < before <= norm["bound"] <= MAX_RMS
        assert 0.2 < after < 5  # the cache holds numbers of about 1
        assert norm["weight"] == 2 ** round(torch.tensor(norm["weight"]).log2().item())


def test_bound_is_reached_by_the_worst_token() -> None:
    generator = torch.Generator().manual_seed(0)
    down_RD = torch.randn(6, 32, generator=generator, dtype=torch.float64)
    down_RD[:, 3] *= 1e4
    weight_D = 1 + 0.3 * torch.randn(32, generator=generator, dtype=torch.float64)
    norm = latent_norm(down_RD, weight_D)
    worst_D = torch.linalg.svd(down_RD * weight_D)[2][0] * 32**0.5
    rms = (norm.down_scale * down_RD @ (weight_D * worst_D)).square().mean().sqrt().item()
    assert rms == pytest.approx(norm.bound, rel=1e-9)
    assert norm.bound <= MAX_RMS
    assert norm.down_scale * norm.weight * norm.up_scale == pytest.approx(1e-3, rel=1e-12)
    assert latent_norm(torch.zeros(6, 32), weight_D).down_scale > 0


def test_residual_stream_is_scaled_where_it_is_written(tmp_path) -> None:
    facts = source_of(tmp_path, tokenizer=False).facts
    scale = residual_scale(facts)
    assert scale**2 * facts.rms_norm_eps == pytest.approx(1e-6, rel=1e-12)
    factors = {
        "model.embed_tokens.weight": scale,
        "model.layers.1.mlp.down_proj.weight": scale,
        "model.layers.1.mlp.up_proj.weight": 1,
        "model.layers.1.input_layernorm.weight": 1,
        "model.norm.weight": 1 / scale,
    }
    assert {name: residual_factor(name, facts) for name in factors} == factors
    untied = replace(facts, tie_word_embeddings=False)
    assert residual_factor("model.norm.weight", untied) == residual_factor("lm_head.weight", untied) == 1
    assert residual_scale(replace(facts, rms_norm_eps=1e-6)) == 1


def full_rank(source: Source, layer_idx: int) -> LatentLayer:
    """Equal to the source: one rope key as wide as all KV heads together, and the values as the latent."""
    facts, tensors = source.facts, source.layer(layer_idx)
    groups, head_dim, heads = facts.num_key_value_heads, facts.head_dim, facts.num_attention_heads

    def wide(rows_GHX: Tensor) -> Tensor:
        """First halves of all heads, then second halves: (P, X)."""
        return rows_GHX.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)

    def per_head(name: str) -> Tensor | None:
        return tensors[name].double().unflatten(0, (-1, head_dim)) if name in tensors else None

    def placed(rows_NHX: Tensor) -> Tensor:
        """Every head's query in the slice of its KV head, zeros elsewhere: (N, P, X)."""
        out = []
        for head in range(heads):
            all_GHX = torch.zeros(groups, *rows_NHX.shape[1:], dtype=torch.float64)
            all_GHX[head // facts.num_key_value_groups] = rows_NHX[head]
            out.append(wide(all_GHX))
        return torch.stack(out)

    q_bias, k_bias = per_head("self_attn.q_proj.bias"), per_head("self_attn.k_proj.bias")
    return LatentLayer(
        form="decoupled",
        down_RD=tensors["self_attn.v_proj.weight"].double(),
        up_k_GMR=torch.zeros(groups, 0, groups * head_dim),
        up_v_GHR=torch.eye(groups * head_dim).unflatten(0, (groups, head_dim)),
        q_rope_NPD=placed(per_head("self_attn.q_proj.weight")),
        k_rope_JPD=wide(per_head("self_attn.k_proj.weight"))[None],
        inv_freq_JF=torch.tensor([rotary_frequencies(facts) * groups], dtype=torch.float64),
        q_rope_bias_NP=None if q_bias is None else placed(q_bias[..., None])[..., 0],
        k_rope_bias_JP=None if k_bias is None else wide(k_bias[..., None])[None, :, 0],
        v_bias_GH=per_head("self_attn.v_proj.bias"),
    )


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_full_rank_is_the_source_model(family: str, tmp_path) -> None:
    source = source_of(tmp_path, family=family, tokenizer=False)
    facts = source.facts
    layers = [full_rank(source, i) for i in range(2)]
    tokens_BL = token_ids()
    original_BLS = AutoModelForCausalLM.from_pretrained(source.name, dtype=torch.float32)(tokens_BL).logits
    assert relative_error(Reference(source, layers.__getitem__).logits(tokens_BL), original_BLS) < 2e-6

    config = deepseek_config(facts, [LatentDims.of(layer) for layer in layers], torch.float32, {})
    width = layers[0].qk_rope_head_dim
    plain_F = facts.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    factors = (plain_F / layers[0].inv_freq_JF[0]).tolist()
    # Only longrope can repeat frequencies, which no conversion asks for; so this table is the test's own.
    config["rope_parameters"] = {
        "rope_type": "longrope", "rope_theta": facts.rope_theta, "attention_factor": 1.0,
        "short_factor": factors, "long_factor": factors, "factor": 1.0,
        "original_max_position_embeddings": facts.max_position_embeddings,
    }  # fmt: skip
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**config)).eval()
    state = {
        name: source.tensor(name) * residual_factor(name, facts)
        for name in source.names()
        if ".self_attn." not in name
    }
    for i, layer in enumerate(layers):
        prefix = f"model.layers.{i}."
        tensors, _ = attention_tensors(
            layer,
            source.tensor(f"{prefix}input_layernorm.weight"),
            source.tensor(f"{prefix}self_attn.o_proj.weight"),
            None,
            has_bias=facts.v_bias,
            has_query_bias=facts.q_bias,
            stream_scale=residual_scale(facts),
        )
        state |= {f"{prefix}self_attn.{name}": tensor for name, tensor in tensors.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    assert relative_error(model(tokens_BL).logits, original_BLS) < 1e-5


def test_pairs_become_neighbours() -> None:
    rows = torch.arange(6)
    assert neighbour_pairs(rows, dim=0).tolist() == [0, 3, 1, 4, 2, 5]
    assert neighbour_pairs(rows[None, :, None], dim=1).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_everything_beside_the_weights_comes_along(tmp_path) -> None:
    source = source_of(tmp_path, family="qwen2")
    layers = [decoupled_layer(source, seed) for seed in range(2)]
    done: list[None] = []
    write_deepseek_checkpoint(
        source, layers.__getitem__, tmp_path / "out", torch.float32, lambda: done.append(None)
    )
    assert len(done) == 2
    text = "The old river 1987 followed\n\n the quiet village!"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(text)["input_ids"] == source.tokenizer()(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.chat_template == source.tokenizer().chat_template
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["first_k_dense_replace"] == 2
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert not list((tmp_path / "out").glob("*.py"))


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({"mlp_bias": True}, torch.float32, "mlp_bias"),
        ({"family": "mistral", "sliding_window": 16}, torch.float32, "sliding_window 16.*--profile care"),
        ({}, torch.float16, "float16.*--dtype bfloat16"),
    ],
)
def test_models_that_the_class_cannot_express(options, dtype, message: str, tmp_path) -> None:
    source = source_of(tmp_path, tokenizer=False, **options)
    with pytest.raises(ExportError, match=message):
        check_deepseek(source.facts, "decoupled", dtype=dtype)
    with pytest.raises(ExportError, match=message):
        write_deepseek_checkpoint(source, lambda i: decoupled_layer(source, i), tmp_path / "out", dtype)
    assert not (tmp_path / "out").exists()


def test_scaled_rope_runs_in_transformers_alone(tmp_path) -> None:
    facts = source_of(tmp_path, tokenizer=False, rope="llama3", tied=False).facts
    assert profile_blocker(facts, "deepseek-v3") is None
    assert "llama3" in str(profile_blocker(facts, "deepseek-v3", engine="vLLM"))
    assert profile_blocker(facts, "deepseek-v3", engine="vLLM", plain_rope=True) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda source, i: random_layer("exact-rope", 20, i), "exact-rope.*--form decoupled"),
        (lambda source, i: random_layer("partial-rope", 20, i), "partial-rope.*--profile care"),
        (lambda source, i: decoupled_layer(source, i, rank=20 - 4 * i), r"16 to 20.*--allocation uniform"),
        (
            lambda source, i: replace(decoupled_layer(source, i), inv_freq_JF=torch.ones(1, 4)),
            r"RoPE frequencies \[1\.0, 1\.0.*--profile care",
        ),
        (
            # The low-frequency half of the table, which no theta makes begin at 1.
            lambda source, i: replace(
                decoupled_layer(source, i), inv_freq_JF=torch.tensor([rotary_frequencies(source.facts)[4:]])
            ),
            "layer 0 has RoPE frequencies",
        ),
    ],
)
def test_layers_that_the_class_cannot_express(change, message: str, tmp_path) -> None:
    source = source_of(tmp_path, tokenizer=False)
    with pytest.raises(ExportError, match=message):
        write_deepseek_checkpoint(source, lambda i: change(source, i), tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()


def test_no_tensor_is_dropped_silently(tmp_path) -> None:
    source = source_of(tmp_path, tokenizer=False)
    extra = "model.layers.0.self_attn.q_norm.weight"
    source.headers[extra] = TensorHeader((16,), torch.float32)
    with pytest.raises(ExportError, match=extra.replace(".", r"\.")):
        write_deepseek_checkpoint(
            source, lambda i: decoupled_layer(source, i), tmp_path / "out", torch.float32
        )
    assert not (tmp_path / "out").exists()


def test_untouched_tensors_are_bit_identical(tmp_path) -> None:
    source = source_of(tmp_path, tokenizer=False, dtype=torch.bfloat16, rms_norm_eps=1e-6, tied=False)
    layers = [decoupled_layer(source, seed) for seed in range(2)]
    write_deepseek_checkpoint(source, layers.__getitem__, tmp_path / "out", torch.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name in source.names():
        if ".self_attn." not in name or name.endswith("o_proj.weight"):
            assert torch.equal(written[name], source.tensor(name)), name
