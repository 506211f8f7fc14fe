"""Running sums: what they add up, how they merge, and how they are stored."""
# Shapes: B sequences, L positions, D hidden_size, N query heads, G KV heads, H head_dim, F frequencies (H/2).

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from care_mla.calibrate.statistics import LayerSums, RotationSums, Sums, marks
from care_mla.errors import ResumeError

CPU = torch.device("cpu")
B, L, D, N, G, H = 6, 5, 7, 4, 2, 4


def batch(seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, L, D), (B, L, N, H // 2), (B, L, G, H), (B, L, G, H), (B, L, G, H)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def layer_sums(parts: tuple[Tensor, ...], sequences: slice = slice(None)) -> LayerSums:
    x, q, grad_k, grad_nope, grad_v = (part[sequences] for part in parts)
    sums = LayerSums.zeros(hidden_size=D, num_heads=N, num_kv_heads=G, head_dim=H, device=CPU)
    sums.add(x, torch.eye(D) / D, q.square().sum((0, 1)), grad_k, grad_nope, grad_v)
    return sums


def rotation_sums() -> RotationSums:
    sums = RotationSums.zeros(hidden_size=D, num_heads=N, head_dim=H, length=9, device=CPU)
    sums.turned_NF += torch.randn(N, H // 2, dtype=torch.complex128)
    sums.weight_NF += 1 + torch.rand(N, H // 2, dtype=torch.float64)
    return sums


def assert_same(a: Sums, b: Sums) -> None:
    for f in fields(a):
        assert_close(getattr(a, f.name), getattr(b, f.name), rtol=1e-12, atol=1e-12)


def test_two_halves_merge_into_the_whole() -> None:
    parts = batch()
    first, second = layer_sums(parts, slice(2)), layer_sums(parts, slice(2, None))
    assert_same(LayerSums.merge([(first, 1.0), (second, 1.0)]), layer_sums(parts))
    assert_same(LayerSums.merge([(second, 1.0), (first, 1.0)]), layer_sums(parts))


def test_weights_mix_corpora_in_given_proportions() -> None:
    small, large = layer_sums(batch(0), slice(1)), layer_sums(batch(1))
    mixed = LayerSums.merge([(small, 0.25 / small.tokens.item()), (large, 0.75 / large.tokens.item())])
    assert mixed.tokens == pytest.approx(1.0)
    expected_DD = 0.25 * small.xx_DD / small.tokens + 0.75 * large.xx_DD / large.tokens
    assert_close(mixed.xx_DD / mixed.tokens, expected_DD)


def test_merging_one_run_of_gamma_with_itself_changes_nothing() -> None:
    sums = rotation_sums()
    assert_close(RotationSums.merge([(sums, 0.5), (sums, 0.5)]).gamma_NF, sums.gamma_NF)


def test_totals_are_float64_whatever_is_added() -> None:
    sums = LayerSums.zeros(hidden_size=D, num_heads=N, num_kv_heads=G, head_dim=H, device=CPU)
    x, q, grad_k, grad_nope, grad_v = (part.float() for part in batch())
    sums.add(x, torch.eye(D) / D, q.square().sum((0, 1)), grad_k, grad_nope, grad_v)
    assert {getattr(sums, f.name).dtype for f in fields(sums)} == {torch.float64}
    assert_close(sums.xx_DD, layer_sums(batch()).xx_DD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sums", [layer_sums(batch()), rotation_sums()], ids=["layer", "rotation"])
def test_what_is_saved_is_loaded_and_always_the_same_bytes(tmp_path: Path, sums: Sums) -> None:
    path = tmp_path / "layer.safetensors"
    assert marks(path) == {}
    contents = set()
    for _ in range(8):  # safetensors orders several metadata keys at random
        sums.save(path, chunks="3", other="x")
        contents.add(path.read_bytes())
    assert len(contents) == 1
    assert (marks(path)["chunks"], marks(path)["other"]) == ("3", "x")
    loaded = type(sums).load(path)
    for f in fields(sums):
        assert torch.equal(getattr(loaded, f.name), getattr(sums, f.name))


def test_a_file_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "work" / "rotation" / "layer_000.safetensors"
    rotation_sums().save(path)
    tensors = load_file(path)
    del tensors["weight_NF"]
    save_file(tensors, path)
    with pytest.raises(ResumeError, match=r"layer_000.*weight_NF.*--work FOLDER.*rm -r .*work$"):
        RotationSums.load(path)


def test_gamma_is_zero_where_nothing_was_seen() -> None:
    sums = RotationSums.zeros(hidden_size=D, num_heads=N, head_dim=H, length=9, device=CPU)
    assert torch.equal(sums.gamma_NF, torch.zeros(N, H // 2, dtype=torch.complex128))
