"""Profile `vllm`: zeros that change nothing, refusals of what vLLM would misread."""
# Shapes: see care_mla/export/vllm.py.

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from care_mla.checkpoint.opening import open_source
from care_mla.checkpoint.source import Source
from care_mla.errors import ExportError, OptionError
from care_mla.export import engine_transformers
from care_mla.export.deepseek import check_deepseek, write_deepseek_checkpoint
from care_mla.export.run import export_model
from care_mla.export.verify import judge, read_reference
from care_mla.export.vllm import pad_for_vllm, write_vllm_checkpoint
from care_mla.export_config import ExportConfig
from care_mla.factors import LatentLayer
from care_mla.mla.reference import Reference
from export_cases import decoupled_layer, export, relative_error, token_ids

from pico import pico_model

# (options of the source, rank, nope, fold, rank to pad to) -> written (R, P, N, V).
PADDINGS: dict[str, tuple[dict[str, Any], int, int, int, int | None, tuple[int, int, int, int]]] = {
    "everything-is-narrow": ({}, 20, 10, 2, 512, (512, 64, 64, 128)),
    "latent-as-it-is": ({"tied": False}, 20, 10, 4, None, (20, 64, 64, 128)),
    "head-dim-64": ({"head_dim": 64}, 32, 64, 1, 256, (256, 64, 64, 128)),
    "head-dim-128": ({"head_dim": 128}, 30, 128, 2, None, (30, 64, 128, 128)),
    "head-dim-96": ({"head_dim": 96, "kv_heads": 4}, 24, 96, 6, None, (24, 64, 128, 128)),
    "wide-heads": ({"head_dim": 192, "kv_heads": 1}, 24, 192, 3, None, (24, 64, 192, 256)),
    "no-keys-without-rope": ({"family": "mistral"}, 20, 0, 1, None, (20, 64, 64, 128)),
}


def source_of(tmp_path, **options: Any) -> Source:
    return open_source(str(pico_model(tmp_path / "source", tokenizer=False, **options)))


def layers_of(source: Source, rank: int = 20, nope: int = 10, fold: int = 2) -> list[LatentLayer]:
    layers = [decoupled_layer(source, seed, rank=rank, nope=nope, fold=fold) for seed in range(2)]
    return [replace(layer, q_nope_NMD=None) for layer in layers] if nope == 0 else layers


@torch.no_grad()
@pytest.mark.parametrize("name", PADDINGS)
def test_zeros_change_nothing(name: str, tmp_path) -> None:
    options, rank, nope, fold, wider, sizes = PADDINGS[name]
    source = source_of(tmp_path, **options)
    layers = layers_of(source, rank, nope, fold)
    summary = write_vllm_checkpoint(
        source, layers.__getitem__, tmp_path / "out", torch.float32, kv_lora_rank=wider
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(model) is DeepseekV3ForCausalLM
    config = model.config
    # vLLM's own class has no tied head.
    assert config.tie_word_embeddings is False
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")
    widths = (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim)
    assert widths == sizes
    assert summary["cached_values"] == sizes[0] + sizes[1]
    assert summary["profile"] == "vllm"
    assert "FLASH_ATTN" in summary["kernels"]
    assert ("CPU_MLA" in summary["kernels"]) is (sizes[0] == 512)
    expected_BLS = Reference(source, layers.__getitem__).logits(token_ids())
    assert relative_error(model(token_ids()).logits, expected_BLS) < 1e-5


@torch.no_grad()
def test_zeros_change_nothing_beside_biases(tmp_path) -> None:
    """vLLM drops biases, so the profile refuses them; the padding itself keeps every one."""
    source = source_of(tmp_path, family="qwen2")
    layers = layers_of(source)
    padded = [pad_for_vllm(layer, rope_theta=source.facts.rope_theta, kv_lora_rank=512) for layer in layers]
    write_deepseek_checkpoint(source, padded.__getitem__, tmp_path / "out", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected_BLS = Reference(source, layers.__getitem__).logits(token_ids())
    assert relative_error(model(token_ids()).logits, expected_BLS) < 1e-5


def test_a_latent_is_not_narrowed(tmp_path) -> None:
    layer = layers_of(source_of(tmp_path))[0]
    with pytest.raises(ExportError, match=r"latent of 20 values.*not narrow it to 16.*--kv-lora-rank 16"):
        pad_for_vllm(layer, rope_theta=1e4, kv_lora_rank=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "qwen2"}, "qwen2 model .attention biases.*--model-impl transformers"),
        ({"attention_bias": True}, "attention biases: vLLM ignores them"),
        ({"rope": "llama3"}, "rope_type llama3.*--model-impl transformers"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"family": "mixtral", "tied": False}, "--profile vllm.*experts.*--profile deepseek-v2"),
        ({"family": "mistral", "sliding_window": 16}, "sliding_window 16"),
    ],
)
def test_models_that_vllm_misreads_are_refused_before_any_work(options, message: str, tmp_path) -> None:
    with pytest.raises(ExportError, match=message):
        check_deepseek(source_of(tmp_path, **options).facts, "decoupled", dtype=torch.float32, profile="vllm")


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"family": "qwen2"}, {}, "layer 0, which has q_rope_bias_NP, .*v_bias_GH: vLLM drops"),
        ({"rope": "llama3"}, {}, r"layer 0, whose RoPE frequencies are not theta\^\(-2i/8\)"),
        ({}, {"v_bias_GH": torch.ones(2, 16)}, "layer 0, which has v_bias_GH"),
        ({}, {"inv_freq_JF": torch.ones(1, 4)}, "YaRN"),
    ],
)
def test_layers_that_vllm_misreads(options, change, message: str, tmp_path) -> None:
    source = source_of(tmp_path, **options)
    layers = [replace(layer, **change) for layer in layers_of(source)]
    with pytest.raises(ExportError, match=message):
        write_vllm_checkpoint(source, layers.__getitem__, tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()


def test_a_converted_folder_is_exported_for_vllm(tmp_path) -> None:
    """Zeros from the folder alone; a bias or a scaled table in it is refused by name."""
    exported = export(tmp_path)
    output = tmp_path / "vllm"
    body = export_model(
        ExportConfig(model=exported.folder, output=output, profile="vllm", kv_lora_rank=512, quiet=True)
    )
    assert (body["kv_lora_rank"], body["qk_rope_head_dim"], body["cached_values"]) == (512, 64, 576)
    assert "CPU_MLA" in body["kernels"]
    verdict = judge(read_reference(output), *engine_transformers.run(output))
    assert verdict["passed"], verdict["problems"]
    assert verdict["relative_error"] < 1e-5
    assert verdict["cached_values"] == 576


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "qwen2"}, r"attention biases.*--model-impl transformers"),
        ({"rope": "llama3"}, r"rope_type llama3.*--model-impl transformers"),
    ],
)
def test_a_converted_folder_that_vllm_misreads(options, message: str, tmp_path) -> None:
    folder = export(tmp_path, tokenizer=False, **options).folder
    with pytest.raises(ExportError, match=message):
        export_model(ExportConfig(model=folder, output=tmp_path / "vllm", profile="vllm", quiet=True))
    assert not (tmp_path / "vllm").exists()


def test_the_rank_is_an_option_of_this_profile_alone() -> None:
    with pytest.raises(OptionError, match=r"--kv-lora-rank 512.*--profile vllm"):
        ExportConfig(model=Path("m"), output=Path("x"), kv_lora_rank=512)
