from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from care_mla.errors import UnsupportedModelError
from care_mla.families import facts_from_config, rotary_frequencies, weight_names
from care_mla.families.rope import rope_amplitude

from pico import CLASSES, LLAMA3_ROPE, pico_model

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 1024,
}


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"tied": False}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"kv_heads": 4}),
        ("llama", {"head_dim": 32}),
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {}),
        ("qwen2", {"tied": False}),
        ("qwen3", {"attention_bias": True}),
        ("qwen3", {"tied": False}),
        ("olmo2", {"attention_bias": True}),
        ("olmo2", {"tied": False}),
    ],
)
def test_weight_names_are_those_of_the_transformers_model(tmp_path, family, options):
    folder = pico_model(tmp_path / "m", family, **options)
    model = AutoModelForCausalLM.from_pretrained(folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert weight_names(facts_from_config(read(folder))) == shapes


# transformers' Phi-3 knows longrope alone.
@pytest.mark.parametrize("rope", [None, "llama3", "yarn", "longrope", "linear"])
@pytest.mark.parametrize("family", sorted(CLASSES.keys() - {"phi3"}))
def test_rotary_frequencies_are_those_of_the_transformers_model(tmp_path, family, rope):
    folder = pico_model(tmp_path / "m", family, rope=rope)
    found = torch.tensor(rotary_frequencies(facts_from_config(read(folder))))
    expected = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    torch.testing.assert_close(found, expected.inv_freq, rtol=5e-7, atol=0)
    assert rope_amplitude(facts_from_config(read(folder))) == pytest.approx(expected.attention_scaling)
    assert (expected.attention_scaling > 1) is (rope in ("yarn", "longrope"))


def test_rotary_frequencies_of_llama_3_2():
    rope = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = LLAMA | {
        "rope_theta": 500000.0,
        "rope_scaling": rope,
        "head_dim": 64,
        "max_position_embeddings": 131072,
    }
    config = LlamaConfig(**{key: value for key, value in old.items() if key != "architectures"})
    found = torch.tensor(rotary_frequencies(facts_from_config(old)))
    torch.testing.assert_close(found, LlamaRotaryEmbedding(config).inv_freq, rtol=5e-7, atol=0)


@pytest.mark.parametrize(("config_class", "model_class"), CLASSES.values(), ids=CLASSES)
def test_absent_keys_take_the_defaults_of_transformers(config_class, model_class):
    sparse = {"model_type": config_class.model_type, "architectures": [model_class.__name__]}
    facts, expected = facts_from_config(sparse), config_class()
    head_dim = expected.hidden_size // expected.num_attention_heads
    for key in LLAMA.keys() - {"architectures"} | {"rms_norm_eps", "tie_word_embeddings"}:
        assert getattr(facts, key) == getattr(expected, key), key
    assert facts.head_dim == (getattr(expected, "head_dim", None) or head_dim)
    assert {"partial_rotary_factor": 1.0} | facts.rope_parameters == (
        {"partial_rotary_factor": 1.0} | expected.rope_parameters
    )
    if config_class is MixtralConfig:
        assert facts.num_experts == expected.num_local_experts
        assert facts.num_experts_per_tok == expected.num_experts_per_tok
        assert facts.sparse_layers == set(range(expected.num_hidden_layers))
    assert facts.sliding_window == getattr(expected, "sliding_window", None)


def test_the_complete_config_builds_the_same_transformers_config():
    old = LLAMA | {"rope_theta": 5000.0, "torch_dtype": "bfloat16"}
    facts = facts_from_config(old)
    assert facts.rope_theta == 5000.0
    assert facts.dtype == "bfloat16"
    assert facts.config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}
    assert not {"rope_theta", "rope_scaling", "torch_dtype"} & facts.config.keys()
    rebuilt = LlamaConfig(**facts.config)
    assert rebuilt.rope_parameters == LlamaConfig(**old).rope_parameters
    assert rebuilt.head_dim == 16


def test_old_and_new_spellings_of_rope_agree():
    inner = {key: value for key, value in LLAMA3_ROPE.items() if key not in ("rope_type", "rope_theta")}
    old = LLAMA | {"rope_theta": 10000.0, "rope_scaling": {"type": "llama3", **inner}}
    new = LLAMA | {"rope_parameters": LLAMA3_ROPE}
    assert facts_from_config(old).rope_parameters == facts_from_config(new).rope_parameters == LLAMA3_ROPE


def test_architecture_follows_from_model_type():
    config = {key: value for key, value in LLAMA.items() if key != "architectures"}
    assert facts_from_config(config).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"architectures": ["WhateverForCausalLM"]},
            "LlamaForCausalLM, MistralForCausalLM, MixtralForCausalLM, Olmo2ForCausalLM, Phi3ForCausalLM, "
            "Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM",
        ),
        ({"architectures": None, "model_type": "whatever"}, "whatever"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "head"),
        ({"architectures": ["Olmo3ForCausalLM"]}, "QK-norm"),
        ({"architectures": ["Qwen3NextForCausalLM"]}, "dense"),
        ({"architectures": ["Gemma2ForCausalLM"]}, "soft-cap"),
        ({"architectures": ["GemmaForCausalLM"]}, "norms add one"),
        ({"architectures": ["Gemma3ForCausalLM"]}, "QK-norm.*sliding"),
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "share one"),
        ({"architectures": ["PhiForCausalLM"]}, "LayerNorm"),
        ({"architectures": ["PhimoeForCausalLM"]}, "sparse mixer"),
        ({"architectures": ["Phi3VForCausalLM"]}, "multimodal"),
        ({"architectures": ["DbrxForCausalLM"], "num_experts": 16}, "mixture of experts"),
        (
            {"architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 512},
            "Multi-head Latent Attention already",
        ),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "encoder-decoder"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"kv_lora_rank": 64}, "Multi-head Latent Attention already"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"text_config": {}}, "multimodal"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}, "modeling_own"),
        ({"use_qk_norm": True}, "QK-norm"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"type": "yarn", "factor": -4.0}}, r"yarn RoPE with factor -4\.0"),
        ({"rope_scaling": {"type": "linear"}}, "linear RoPE with factor None"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 0}}, "beta_fast 0"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0, "short_factor": 1.0}}, "short_factor 1.0"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7}},
            "long_factor has 7 entries, and heads have 8",
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'.*length of the text"),
        ({"rope_parameters": {"rope_type": "axial"}}, "'axial'.*unknown here.*linear, yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_parameters": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(change, named):
    with pytest.raises(UnsupportedModelError, match=named):
        facts_from_config(LLAMA | change)


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
        {"layer_types": ["full_attention", "sliding_attention"]},
    ],
)
def test_windowed_qwen_is_refused(change, architecture):
    qwen2 = LLAMA | {"architectures": [architecture], "model_type": "qwen"}
    with pytest.raises(UnsupportedModelError, match="sliding"):
        facts_from_config(qwen2 | change)
    # Switched on, but from a layer on that this model does not have.
    assert (
        facts_from_config(qwen2 | {"use_sliding_window": True, "max_window_layers": 2}).sliding_window is None
    )


def test_mistral_with_two_kinds_of_layers_is_refused():
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    with pytest.raises(UnsupportedModelError, match="layer_types"):
        facts_from_config(mistral | {"layer_types": ["full_attention", "sliding_attention"]})


def test_families_need_neither_torch_nor_transformers():
    code = "import sys, care_mla.families; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
