"""A layer's own output projection is what every writer writes and every forward uses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from care_mla.calibrate.layers import LayerStack
from care_mla.checkpoint.opening import open_source
from care_mla.checkpoint.source import Source
from care_mla.export.deepseek import write_deepseek_checkpoint
from care_mla.export.gguf_model import write_gguf
from care_mla.export.hf import write_latent_checkpoint
from care_mla.export.vllm import write_vllm_checkpoint
from care_mla.factors import LatentLayer
from care_mla.mla.divergence import measure
from care_mla.mla.reference import Reference
from export_cases import decoupled_layer, relative_error, token_ids

from pico import pico_model

CPU = torch.device("cpu")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    # bfloat16, so that a projection rounded to the source's dtype would show.
    folder = pico_model(tmp_path / "source", dtype=torch.bfloat16, rms_norm_eps=1e-6)
    return open_source(str(folder))


def layers_of(source: Source) -> list[LatentLayer]:
    generator = torch.Generator().manual_seed(1)
    return [
        replace(
            decoupled_layer(source, seed, nope=16),
            o_weight_DO=torch.randn(64, 64, generator=generator, dtype=torch.float64) / 8,
        )
        for seed in range(2)
    ]


def test_it_survives_a_file(source: Source, tmp_path: Path) -> None:
    layer = layers_of(source)[0]
    layer.save(tmp_path / "layer.safetensors")
    assert torch.equal(
        LatentLayer.load(tmp_path / "layer.safetensors").output_weight(torch.ones(1)), layer.o_weight_DO
    )


@pytest.mark.parametrize(
    "write",
    [write_deepseek_checkpoint, write_vllm_checkpoint, write_latent_checkpoint],
    ids=lambda f: f.__name__,
)
def test_folders_hold_it(write: Any, source: Source, tmp_path: Path) -> None:
    layers = layers_of(source)
    write(source, layers.__getitem__, tmp_path / "out", torch.float32)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for layer_idx, layer in enumerate(layers):
        found = tensors[f"model.layers.{layer_idx}.self_attn.o_proj.weight"].unflatten(1, (4, -1))
        # The profile vllm widens values by zeros.
        assert torch.equal(found[..., :16].flatten(1), layer.output_weight(found).float())
        assert not found[..., 16:].any()


def test_gguf_files_hold_it(source: Source, tmp_path: Path) -> None:
    layers = layers_of(source)
    write_gguf(source, layers.__getitem__, tmp_path / "out.gguf", torch.float32)
    tensors = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    ratios = [
        tensors[f"blk.{layer_idx}.attn_output.weight"] / layer.output_weight(torch.ones(1)).float()
        for layer_idx, layer in enumerate(layers)
    ]
    # The stream may be scaled, by a power of two.
    assert all(torch.equal(ratio, ratios[0][0, 0].expand_as(ratio)) for ratio in ratios)


def test_reference_and_streamed_forward_use_it(source: Source) -> None:
    layers = layers_of(source)
    without = [replace(layer, o_weight_DO=None) for layer in layers]
    tokens_BL = token_ids(2, 24)
    logits_BLS, plain_BLS = (
        Reference(source, each.__getitem__).logits(tokens_BL) for each in (layers, without)
    )
    assert relative_error(plain_BLS, logits_BLS) > 0.1
    log_BLS = logits_BLS[:, :-1].log_softmax(-1)
    expected = -log_BLS.gather(2, tokens_BL[:, 1:, None]).sum().item()
    _, measured = measure(LayerStack(source, device=CPU), {"own": layers.__getitem__}, tokens_BL)
    assert measured["own"].nll == pytest.approx(expected, rel=1e-5)
