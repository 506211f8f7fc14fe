"""`care export` between folders: the same bytes in the same profile, the same logits in every other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from care_mla.configs import VerifyConfig
from care_mla.errors import CheckpointError, ExportError, OptionError
from care_mla.export import engine_transformers
from care_mla.export.converted import ConvertedFolder
from care_mla.export.hf import write_latent_checkpoint
from care_mla.export.run import export_model
from care_mla.export.verify import judge, read_reference, store_reference, verify
from care_mla.export_config import ExportConfig
from care_mla.mla.reference import Reference
from export_cases import export, relative_error, token_ids

from pico import PARTIAL_LONGROPE

CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-untied-eps-1e-6": {"tied": False, "rms_norm_eps": 1e-6},
    "llama3-rope": {"rope": "llama3"},
    "yarn-rope": {"rope": "yarn"},
    "longrope-partial": {"family": "phi3", "tied": False, "rope": PARTIAL_LONGROPE},
    "llama-biases": {"attention_bias": True},
    "mistral": {"family": "mistral", "tied": False, "head_dim": 32},
    "qwen2": {"family": "qwen2"},
}


def own_folder(tmp_path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A model of the profile `care` with the factors of `export_cases`."""
    exported, folder = export(tmp_path, tokenizer=False, **options), tmp_path / "own"
    write_latent_checkpoint(exported.source, exported.layers.__getitem__, folder, dtype)
    store_reference(folder, exported.source, exported.layers.__getitem__, token_ids(), num_greedy=8)
    return folder


def verify_here(folder: Path) -> dict[str, Any]:
    return judge(read_reference(folder), *engine_transformers.run(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_same_profile_gives_the_same_bytes(name: str, dtype: torch.dtype, tmp_path) -> None:
    folder = export(tmp_path, dtype, **CASES[name]).folder
    body = export_model(ExportConfig(model=folder, output=tmp_path / "again", quiet=True))
    assert body["profile"] == "deepseek-v3"
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again/model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype == dtype
        assert torch.equal(tensor, after[key]), key
    for file in sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()):
        if file.name != "reference.safetensors":
            assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


@pytest.mark.parametrize("name", CASES)
def test_layers_read_back_are_the_model(name: str, tmp_path) -> None:
    exported = export(tmp_path, tokenizer=False, **CASES[name])
    model = ConvertedFolder(exported.folder)
    model.check()
    found_BLS = Reference(model, model.latent_layer).logits(token_ids())
    assert relative_error(found_BLS, read_reference(exported.folder).reference_BLS) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_deepseek_v2(name: str, tmp_path) -> None:
    folder = export(tmp_path, tokenizer=False, **CASES[name]).folder
    export_model(ExportConfig(model=folder, output=tmp_path / "v2", profile="deepseek-v2", quiet=True))
    body = verify_here(tmp_path / "v2")
    assert body["passed"], body["problems"]
    assert body["class"] == "DeepseekV2ForCausalLM"
    assert body["relative_error"] < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_own_class_becomes_a_stock_one(name: str, tmp_path) -> None:
    folder = own_folder(tmp_path, **CASES[name])
    export_model(ExportConfig(model=folder, output=tmp_path / "stock", quiet=True))
    body = verify_here(tmp_path / "stock")
    assert body["passed"], body["problems"]
    assert body["class"] == "DeepseekV3ForCausalLM"
    assert body["relative_error"] < 1e-5


def test_other_dtypes_say_so_in_the_reference(tmp_path) -> None:
    folder = export(tmp_path, torch.float32, tokenizer=False).folder
    for model, output, quantization in ((folder, "bf16", "bf16"), (tmp_path / "bf16", "f32", "f32")):
        export_model(
            ExportConfig(model=model, output=tmp_path / output, quantization=quantization, quiet=True)
        )
        stored = read_reference(tmp_path / output)
        # Weights that were rounded once are not exact again.
        assert (stored.dtype, stored.tolerance) == ("bfloat16", 5e-2)
        assert verify_here(tmp_path / output)["passed"]
    assert read_reference(folder).tolerance == 1e-4


def test_an_exported_folder_passes_in_a_fresh_process(tmp_path) -> None:
    folder = export(tmp_path, tokenizer=False).folder
    export_model(ExportConfig(model=folder, output=tmp_path / "v2", profile="deepseek-v2", quiet=True))
    assert verify(VerifyConfig(model=tmp_path / "v2"))["passed"]
    with pytest.raises(ExportError, match=r"deepseek_v2.*exported already.*care convert wrote"):
        ConvertedFolder(tmp_path / "v2")


def test_what_no_stock_profile_has_is_refused_by_name(tmp_path) -> None:
    exported = export(tmp_path, tokenizer=False)

    def own(change: dict[int, Any], name: str) -> Path:
        layers = [replace(layer, **change.get(i, {})) for i, layer in enumerate(exported.layers)]
        write_latent_checkpoint(exported.source, layers.__getitem__, tmp_path / name, torch.float32)
        store_reference(tmp_path / name, exported.source, layers.__getitem__, token_ids(), num_greedy=2)
        return tmp_path / name

    first = exported.layers[0]
    narrow = {"down_RD": first.down_RD[:12], "up_k_GMR": first.up_k_GMR[..., :12]}
    ranks = own({0: narrow | {"up_v_GHR": first.up_v_GHR[..., :12]}}, "ranks")
    with pytest.raises(ExportError, match=r"ranks per layer \(12 to 20\).*--allocation uniform"):
        export_model(ExportConfig(model=ranks, output=tmp_path / "x", quiet=True))
    config = json.loads((ranks / "config.json").read_text())
    (ranks / "config.json").write_text(json.dumps(config | {"latent_form": "exact-rope"}))
    with pytest.raises(ExportError, match=r"--form exact-rope.*--form decoupled"):
        export_model(ExportConfig(model=ranks, output=tmp_path / "x", quiet=True))
    assert not (tmp_path / "x").exists()


def test_folders_that_cannot_be_exported(tmp_path) -> None:
    exported = export(tmp_path, tokenizer=False)
    with pytest.raises(CheckpointError, match=r"source_config\.json is missing.*care convert"):
        export_model(ExportConfig(model=tmp_path / "source", output=tmp_path / "x", quiet=True))
    weights = load_file(exported.folder / "model.safetensors")
    lost = weights.pop("model.layers.1.self_attn.kv_b_proj.weight")
    save_file(weights | {"model.layers.1.stray": lost}, exported.folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing tensor model\.layers\.1\.self_attn\.kv_b_proj"):
        export_model(ExportConfig(model=exported.folder, output=tmp_path / "x", quiet=True))
    save_file(
        weights | {"model.layers.1.self_attn.kv_b_proj.weight": lost, "model.layers.1.stray": lost.clone()},
        exported.folder / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"unknown tensor model\.layers\.1\.stray"):
        export_model(ExportConfig(model=exported.folder, output=tmp_path / "x", quiet=True))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "deepseek-v3", "quantization": "f16"}, r"f16 cannot be written.*bf16"),
        ({"profile": "deepseek-v2", "quantization": "q8_0"}, r"q8_0.*--profile gguf"),
        ({"profile": "gguf"}, r"does not end in \.gguf.*x\.gguf"),
        ({"profile": "deepseek-v2", "output": Path("x.gguf")}, r"like a file.*--profile gguf"),
        ({"profile": "nonsense"}, r"Choose one of: deepseek-v3"),
        ({"quantization": "q3"}, r"Choose one of: f32"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ExportConfig(**({"model": Path("m"), "output": Path("x")} | options))


def test_taken_and_absent_paths(tmp_path) -> None:
    folder = export(tmp_path, tokenizer=False).folder
    for output, message in (
        (tmp_path / "source", r"exists already.*--overwrite"),
        (folder / "x", r"lies in .*outside"),
    ):
        with pytest.raises(OptionError, match=message):
            export_model(ExportConfig(model=folder, output=output, quiet=True))
    with pytest.raises(OptionError, match=r"not a folder.*care convert"):
        export_model(ExportConfig(model=tmp_path / "nothing", output=tmp_path / "x", quiet=True))
