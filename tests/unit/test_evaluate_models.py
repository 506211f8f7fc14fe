"""Opening a model to be measured: wherever it lies, and only if it is what this package wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from care_mla.checkpoint.opening import open_source
from care_mla.errors import CheckpointError
from care_mla.evaluate.models import open_model
from care_mla.export.hf import write_latent_checkpoint
from export_cases import export, token_ids
from latent_models import random_layer

from pico import pico_gguf, pico_model

CPU = torch.device("cpu")


def logits(name: str) -> torch.Tensor:
    model = open_model(name, device=CPU, trust_remote_code=False).load()
    with torch.no_grad():
        return model(token_ids()).logits


def own_class(folder: Path) -> Path:
    """A model of our own class, which lies in its folder as code."""
    source = open_source(str(pico_model(folder / "own-source")))
    layers = [random_layer("exact-rope", 20, seed) for seed in range(2)]
    write_latent_checkpoint(source, layers.__getitem__, folder / "own", torch.float32)
    return folder / "own"


def test_hub_ids_are_found_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    exported = export(tmp_path)
    for folder in (tmp_path / "source", exported.folder, own_class(tmp_path)):
        cached = tmp_path / "hub" / f"models--me--{folder.name}"
        shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0" * 40)
        opened = open_model(f"me/{folder.name}", device=CPU, trust_remote_code=False)
        assert opened.name == f"me/{folder.name}"
        assert opened.max_length == 1024
        assert torch.equal(logits(opened.name), logits(str(folder)))


def test_a_gguf_file_is_the_model_that_it_was_made_of(tmp_path: Path) -> None:
    folder = pico_model(tmp_path / "model")
    torch.testing.assert_close(logits(str(pico_gguf(folder))), logits(str(folder)))


def test_a_converted_file_that_is_cut_off_is_named_on_opening(tmp_path: Path) -> None:
    path = export(tmp_path).folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_model(str(path.parent), device=CPU, trust_remote_code=False)


def test_code_that_is_not_ours_is_not_run(tmp_path: Path) -> None:
    folder = own_class(tmp_path)
    with (folder / "modeling.py").open("a") as file:
        file.write("raise SystemExit('was run')\n")
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        open_model(str(folder), device=CPU, trust_remote_code=False)
