"""Checkpoints whose files name or join tensors in their own way: read under standard names, and refused."""
# Shapes: D hidden_size, E experts, O rows of a fused projection.

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from care_mla.calibrate.layers import LayerStack
from care_mla.calibrate.sample import load_model
from care_mla.checkpoint.opening import open_source
from care_mla.checkpoint.spelling import module_tensors
from care_mla.errors import CheckpointError, UnsupportedModelError
from care_mla.families import facts_from_config, layer_weight_names
from care_mla.families.experts import QWEN_DEFAULTS, qwen_experts
from export_cases import relative_error, token_ids

from pico import pico_model

CPU = torch.device("cpu")
PARTIAL: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"family": "mixtral", "tied": False},
    "mixtral-window": {"family": "mixtral", "sliding_window": 6},
    "phi3": {"family": "phi3", "tied": False},
    "phi3-partial": {"family": "phi3", "rope": PARTIAL, "sliding_window": 7},
}


def without(name: str) -> Any:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def edit(folder: Path, change: Any) -> None:
    """Rewrite the weights by a function of their dictionary."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def test_fused_projections_are_split_and_experts_named_as_llamas(tmp_path: Path) -> None:
    phi = open_source(str(pico_model(tmp_path / "phi", "phi3", tokenizer=False)))
    stored = load_file(tmp_path / "phi" / "model.safetensors")
    qkv_OD = stored["model.layers.1.self_attn.qkv_proj.weight"]
    prefix = "model.layers.1."
    assert torch.equal(phi.tensor(f"{prefix}self_attn.q_proj.weight"), qkv_OD[:64])
    assert torch.equal(phi.tensor(f"{prefix}self_attn.k_proj.weight"), qkv_OD[64:96])
    assert torch.equal(phi.tensor(f"{prefix}self_attn.v_proj.weight"), qkv_OD[96:])
    assert torch.equal(
        phi.tensor(f"{prefix}mlp.up_proj.weight"), stored[f"{prefix}mlp.gate_up_proj.weight"][128:]
    )
    mixtral = open_source(str(pico_model(tmp_path / "mixtral", "mixtral", tokenizer=False)))
    stored = load_file(tmp_path / "mixtral" / "model.safetensors")
    for ours, theirs in {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}.items():
        assert torch.equal(
            mixtral.tensor(f"{prefix}mlp.experts.3.{ours}.weight"),
            stored[f"{prefix}block_sparse_moe.experts.3.{theirs}.weight"],
        )
    assert torch.equal(
        mixtral.tensor(f"{prefix}mlp.gate.weight"), stored[f"{prefix}block_sparse_moe.gate.weight"]
    )


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_stock_layers_are_filled(name: str, tmp_path: Path) -> None:
    source = open_source(str(pico_model(tmp_path / "m", tokenizer=False, **MODELS[name])))
    source.check()
    stock = AutoModelForCausalLM.from_pretrained(source.name, dtype=torch.float32)
    tokens_BL = token_ids()
    expected_BLS = stock(tokens_BL).logits
    assert torch.equal(load_model(source, device=CPU)(tokens_BL).logits, expected_BLS)
    stack = LayerStack(source, device=CPU)
    x_BLD = stack.embed(tokens_BL)
    for layer_idx in range(stack.num_layers):
        with stack.layer(layer_idx) as layer:
            x_BLD = stack.run(layer, x_BLD)
    with stack.head() as head:
        assert relative_error(head(x_BLD), expected_BLS) < 1e-6


def test_tensors_of_modules_are_those_of_the_stock_layer(tmp_path: Path) -> None:
    for name in ("mixtral", "phi3"):
        source = open_source(str(pico_model(tmp_path / name, name, tokenizer=False)))
        layer = AutoModelForCausalLM.from_pretrained(source.name).model.layers[1]
        found = module_tensors(source.facts, 1, source.layer(1))
        assert found.keys() == layer.state_dict().keys()
        for key, tensor in layer.state_dict().items():
            assert torch.equal(found[key], tensor), key


def test_layers_without_attention_keep_the_rest(tmp_path: Path) -> None:
    source = open_source(str(pico_model(tmp_path / "m", "phi3", tokenizer=False)))
    kept = {name: t for name, t in source.layer(0).items() if not name.startswith("self_attn.")}
    assert set(module_tensors(source.facts, 0, kept)) == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "mlp.gate_up_proj.weight",
        "mlp.down_proj.weight",
    }


def test_a_missing_or_wrong_tensor_is_named_as_the_file_has_it(tmp_path: Path) -> None:
    qkv = "model.layers.0.self_attn.qkv_proj.weight"
    pico_model(tmp_path / "missing", "phi3", tokenizer=False)
    edit(tmp_path / "missing", without(qkv))
    with pytest.raises(
        CheckpointError, match=r"missing tensor model\.layers\.0\.self_attn\.qkv_proj\.weight"
    ):
        open_source(str(tmp_path / "missing")).check()

    pico_model(tmp_path / "short", "phi3", tokenizer=False)
    edit(tmp_path / "short", lambda tensors: tensors | {qkv: tensors[qkv][:-1].clone()})
    with pytest.raises(CheckpointError, match=r"qkv_proj\.weight has shape \[127, 64\].*64 \+ 32 \+ 32 rows"):
        open_source(str(tmp_path / "short")).check()

    pico_model(tmp_path / "twice", "phi3", tokenizer=False)
    q = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64)}
    edit(tmp_path / "twice", lambda tensors: tensors | q)
    with pytest.raises(CheckpointError, match="twice"):
        open_source(str(tmp_path / "twice")).check()

    expert = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    pico_model(tmp_path / "expert", "mixtral", tokenizer=False)
    edit(tmp_path / "expert", without(expert))
    with pytest.raises(CheckpointError, match=r"missing tensor .*experts\.2\.w3\.weight"):
        open_source(str(tmp_path / "expert")).check()

    pico_model(tmp_path / "more", "mixtral", tokenizer=False)
    more = {"model.layers.0.block_sparse_moe.experts.4.w1.weight": torch.zeros(48, 64)}
    edit(tmp_path / "more", lambda tensors: tensors | more)
    with pytest.raises(CheckpointError, match=r"unknown tensor .*experts\.4"):
        open_source(str(tmp_path / "more")).check()


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("mixtral", {"num_experts_per_tok": 5}, "only 4 experts"),
        ("mixtral", {"num_local_experts": 0}, "num_experts is 0"),
        ("phi3", {"rope_parameters": PARTIAL | {"partial_rotary_factor": 0.2}}, "rotates 3 dimensions"),
        ("phi3", {"rope_parameters": PARTIAL | {"partial_rotary_factor": 1.5}}, "rotates 24 dimensions"),
        ("phi3", {"rope_parameters": PARTIAL | {"rope_type": "llama3"}}, "llama3"),
    ],
)
def test_numbers_that_make_no_model_are_refused(
    family: str, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    pico_model(tmp_path / "m", family, tokenizer=False)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    with pytest.raises(UnsupportedModelError, match=named):
        facts_from_config(config | change)


def test_partial_rotary_is_read_in_both_spellings(tmp_path: Path) -> None:
    pico_model(tmp_path / "m", "phi3", rope=PARTIAL, tokenizer=False)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    new = facts_from_config(config)
    old = facts_from_config(
        {key: value for key, value in config.items() if key != "rope_parameters"}
        | {"rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 0.75}
    )
    assert new.rotary_dim == old.rotary_dim == 12
    assert new.config["rope_parameters"] == old.config["rope_parameters"] == PARTIAL


def test_qwens_experts_are_in_the_layers_that_it_says(tmp_path: Path) -> None:
    pico_model(
        tmp_path / "m", "qwen3_moe", layers=4, mlp_only_layers=[1], decoder_sparse_step=2, tokenizer=False
    )
    experts = qwen_experts(QWEN_DEFAULTS | json.loads((tmp_path / "m" / "config.json").read_text()))
    assert experts is not None
    assert (experts.num_experts, experts.num_experts_per_tok, experts.norm_topk_prob) == (6, 2, True)
    assert experts.sparse_layers == {3}
    assert qwen_experts(QWEN_DEFAULTS | {"num_hidden_layers": 2, "mlp_only_layers": [0, 1]}) is None


def test_dense_and_sparse_layers_have_their_own_tensors(tmp_path: Path) -> None:
    source = open_source(str(pico_model(tmp_path / "m", "mixtral", tokenizer=False)))
    facts = replace(source.facts, sparse_layers=frozenset({1}), moe_intermediate_size=20)
    dense, sparse = (layer_weight_names(facts, layer_idx) for layer_idx in (0, 1))
    assert dense["mlp.gate_proj.weight"] == (48, 64)
    assert sparse["mlp.gate.weight"] == (4, 64)
    assert sparse["mlp.experts.3.down_proj.weight"] == (64, 20)
    assert "mlp.gate_proj.weight" not in sparse
