"""What is cached, counted from a live cache, against what each kind of attention must hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from care_mla.checkpoint.opening import open_source
from care_mla.evaluate.cache import live_cache
from care_mla.evaluate.models import open_model
from care_mla.evaluate.speed import speed
from care_mla.export.hf import write_latent_checkpoint
from export_cases import export
from latent_models import random_layer

from pico import pico_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("options", [{}, {"family": "mistral", "sliding_window": 8}])
def test_a_source_holds_keys_and_values(options: dict[str, object], tmp_path: Path) -> None:
    folder = pico_model(tmp_path / "model", **options)  # type: ignore[arg-type]
    cache = live_cache(open_model(str(folder), device=CPU, trust_remote_code=False).load())
    # Two KV heads, 16 wide, keys and values; two layers, four bytes.
    assert cache == (64, 64 * 2 * 4, "float32")


def test_a_converted_model_holds_its_latent_and_rope_key(tmp_path: Path) -> None:
    exported = export(tmp_path)
    values = exported.layers[0].cached_values
    assert values < 64
    cache = live_cache(open_model(str(exported.folder), device=CPU, trust_remote_code=False).load())
    assert cache == (values, values * 2 * 4, "float32")


def test_ranks_per_layer_are_averaged_and_their_bytes_added(tmp_path: Path) -> None:
    source = open_source(str(pico_model(tmp_path / "model")))
    layers = [random_layer("exact-rope", 20, 0), random_layer("exact-rope", 11, 1)]
    write_latent_checkpoint(source, layers.__getitem__, tmp_path / "out", torch.float32)
    model = open_model(str(tmp_path / "out"), device=CPU, trust_remote_code=False).load()
    assert live_cache(model) == (15.5, 31 * 4, "float32")


def test_speed_is_measured_within_the_context(tmp_path: Path) -> None:
    folder = pico_model(tmp_path / "model", max_position_embeddings=64)
    opened = open_model(str(folder), device=CPU, trust_remote_code=False)
    done: list[int] = []
    found = speed(opened.load(), max_length=opened.max_length, advance=lambda: done.append(1))
    assert found["prompt_tokens"] + found["new_tokens"] == 64
    assert len(done) == found["repeats"]
    assert found["prefill_tokens_per_second"] > found["decode_tokens_per_second"] > 0
