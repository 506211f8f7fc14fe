"""Mixtures of experts in a real llama.cpp: exact in float32, wrong files fail, experts pass to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from care_mla.checkpoint.opening import open_source
from care_mla.checkpoint.source import Source
from care_mla.configs import VerifyConfig
from care_mla.errors import ExportError
from care_mla.export.converted import ConvertedFolder
from care_mla.export.gguf_model import check_gguf, write_gguf
from care_mla.export.llama_cpp import reference_path
from care_mla.export.run import export_model
from care_mla.export.stock import write_deepseek_v2_checkpoint, write_mistral4_checkpoint
from care_mla.export.verify import StoredReference, judge, read_reference, store_reference, verify
from care_mla.export_config import ExportConfig
from export_cases import decoupled_layer, token_ids
from gguf_files import Change, rewrite

from pico import pico_model

# torch says so of the shared expert that Mistral 4's class insists on, 0 wide.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
CASES: dict[str, dict[str, Any]] = {
    "mixtral": {"family": "mixtral", "tied": False},
    "mixtral-tied-eps-1e-6": {"family": "mixtral", "rms_norm_eps": 1e-6},
    "qwen3-moe": {"family": "qwen3_moe", "layers": 3, "tied": False},
    "qwen3-moe-sum-not-1": {"family": "qwen3_moe", "norm_topk_prob": False},
    "qwen3-moe-after-a-dense-layer": {"family": "qwen3_moe", "layers": 3, "mlp_only_layers": [0]},
}


def converted(tmp: Path, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Source, Path]:
    source = open_source(str(pico_model(tmp / "source", **options)))

    def layer(layer_idx: int) -> Any:
        return decoupled_layer(source, layer_idx)

    is_mistral = source.facts.norm_topk_prob
    write = write_mistral4_checkpoint if is_mistral else write_deepseek_v2_checkpoint
    write(source, layer, tmp / "out", dtype)
    store_reference(tmp / "out", source, layer, token_ids(), num_greedy=8)
    return source, tmp / "out"


def gguf_of(folder: Path, file: Path, **options: Any) -> dict[str, Any]:
    return export_model(ExportConfig(model=folder, output=file, quiet=True, **options))


def run(file: Path) -> dict[str, Any]:
    return verify(VerifyConfig(model=file, engine="llama.cpp"))


@pytest.mark.parametrize("name", CASES)
def test_float32_gives_the_references_logits(name: str, tmp_path: Path) -> None:
    source, folder = converted(tmp_path, **CASES[name])
    body = gguf_of(folder, tmp_path / "x.gguf")
    found = run(tmp_path / "x.gguf")
    assert found["passed"], found["problems"]
    assert found["relative_error"] < 1e-5
    assert found["greedy_equal"]
    assert found["cached_values"] == 20 + 8
    assert body["residual_scale"] == 2**14
    keys = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert keys["deepseek2.expert_weights_norm"].contents() is source.facts.norm_topk_prob
    assert keys["deepseek2.leading_dense_block_count"].contents() == min(source.facts.sparse_layers)


@pytest.mark.parametrize(
    ("quantization", "low", "high"),
    [("bf16", 1e-3, 5e-2), ("f16", 1e-4, 1e-2), ("q8_0", 1e-3, 0.1), ("q4_k_m", 1e-2, 0.5)],
)
def test_rounded_types_survive(quantization: str, low: float, high: float, tmp_path: Path) -> None:
    _, folder = converted(
        tmp_path, family="qwen3_moe", hidden=256, head_dim=32, heads=8, moe_intermediate_size=256
    )
    gguf_of(folder, tmp_path / "x.gguf", quantization=quantization)
    # In float16 one token takes another expert.
    found = run(tmp_path / "x.gguf")
    assert found["passed"], found["problems"]
    assert low < found["relative_error"] < high
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert kinds["blk.1.ffn_gate_inp.weight"] == "F32"
    assert kinds["blk.1.ffn_gate_exps.weight"] == quantization.upper().removesuffix("_M")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_pass_through_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    source, folder = converted(tmp_path, dtype, family="mixtral")
    gguf_of(folder, tmp_path / "x.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    for layer_idx in range(2):
        for name in ("gate", "up", "down"):
            stacked = tensors[f"blk.{layer_idx}.ffn_{name}_exps.weight"]
            found = torch.tensor(gguf.quants.dequantize(stacked.data, stacked.tensor_type))
            for e in range(4):
                expert = source.tensor(f"model.layers.{layer_idx}.mlp.experts.{e}.{name}_proj.weight")
                assert torch.equal(found[e], expert.to(dtype).float())
            shared = tensors[f"blk.{layer_idx}.ffn_{name}_shexp.weight"]
            assert not gguf.quants.dequantize(shared.data, shared.tensor_type).any()


def key(name: str, value: Any) -> Change:
    def change(tensors: dict[str, np.ndarray], keys: dict[str, Any]) -> None:
        assert keys[f"deepseek2.{name}"] != value
        keys[f"deepseek2.{name}"] = value

    return change


def no_scale(tensors: dict[str, np.ndarray], keys: dict[str, Any]) -> None:
    del keys["deepseek2.expert_weights_scale"]


def no_norm(tensors: dict[str, np.ndarray], keys: dict[str, Any]) -> None:
    del keys["deepseek2.expert_weights_norm"]


def other_expert(tensors: dict[str, np.ndarray], keys: dict[str, Any]) -> None:
    tensors["blk.1.ffn_up_exps.weight"] = tensors["blk.1.ffn_up_exps.weight"][::-1].copy()


def sharing_expert(tensors: dict[str, np.ndarray], keys: dict[str, Any]) -> None:
    for name in ("gate", "up", "down"):
        shared = f"blk.0.ffn_{name}_shexp.weight"
        tensors[shared] = tensors[f"blk.0.ffn_{name}_exps.weight"][0] * (2**14 if name == "down" else 1)


MUTATIONS: dict[str, Change] = {
    "nothing": lambda tensors, keys: None,
    "no-scale": no_scale,
    "no-norm": no_norm,
    "sigmoid": key("expert_gating_func", 2),
    "one-expert-less": key("expert_used_count", 1),
    "experts-in-another-order": other_expert,
    "a-shared-expert": sharing_expert,
}


@pytest.fixture(scope="module")
def exported_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    gguf_of(converted(folder, family="mixtral")[1], folder / "x.gguf")
    return folder / "x.gguf"


@pytest.mark.parametrize("name", MUTATIONS)
def test_wrong_files_fail(name: str, exported_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(exported_file.read_bytes())
    reference_path(file).write_bytes(reference_path(exported_file).read_bytes())
    rewrite(file, MUTATIONS[name])
    body = run(file)
    assert body["passed"] is (name == "nothing")
    if name != "nothing":
        assert "relative error" in body["problems"][0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sparse_layers": frozenset({0})}, "dense layers behind layers with experts"),
        ({"num_experts": 1}, "num_experts 1"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_what_llama_cpp_cannot_route_is_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model = ConvertedFolder(converted(tmp_path, family="mixtral", tokenizer=False)[1])
    model.facts = replace(model.facts, **change)
    with pytest.raises(ExportError, match=rf"{reason}.*Nothing was written"):
        check_gguf(model, torch.float32)


def test_a_few_tokens_at_other_experts_are_rounding(tmp_path: Path) -> None:
    """Where weights are rounded, and there are experts; more than a few tokens are a mistake."""
    stored = read_reference(converted(tmp_path, family="mixtral", tokenizer=False)[1])
    assert stored.has_experts
    rounded = replace(stored, dtype="f16", tolerance=1e-2)
    metadata = {"class": "deepseek2", "cached_values": stored.cached_values, "problems": []}

    def passes(reference: StoredReference, wrong_tokens: int) -> bool:
        logits_BLS = stored.reference_BLS.clone()
        logits_BLS[0, :wrong_tokens] *= -0.3
        tensors = {"logits_BLS": logits_BLS, "greedy_T": stored.greedy_T}
        return judge(reference, tensors, metadata)["passed"]

    assert passes(rounded, 4)
    assert not passes(rounded, 5)
    assert not passes(replace(rounded, has_experts=False), 1)
    assert not passes(stored, 1)


def test_rounding_does_not_hide_a_forgotten_scale(tmp_path: Path) -> None:
    source, folder = converted(tmp_path, family="mixtral")
    model = ConvertedFolder(folder)
    model.facts = replace(model.facts, routed_scaling_factor=1.0)
    assert source.facts.rms_norm_eps == 1e-5  # so that the folder's stream is scaled already
    gguf_of(folder, tmp_path / "x.gguf", quantization="f16")
    write_gguf(model, model.latent_layer, tmp_path / "x.gguf", torch.float16)
    body = run(tmp_path / "x.gguf")
    assert not body["passed"]
    assert body["relative_error"] > 0.1
