from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from care_mla.checkpoint.opening import open_source
from care_mla.checkpoint.writer import ShardWriter, atomic_folder, require_disk
from care_mla.errors import CareError, OptionError

from pico import pico_model


@pytest.mark.parametrize("max_shard_bytes", [2**30, 100_000, 1])
def test_written_shards_load_in_transformers(tmp_path, max_shard_bytes):
    source = open_source(str(pico_model(tmp_path / "m", tied=False)))
    output = tmp_path / "out"
    writer = ShardWriter(output, max_shard_bytes)
    for name in source.names():
        writer.add(name, source.tensor(name))
    paths = writer.close()
    (output / "config.json").write_text(json.dumps(source.facts.config))
    assert sorted(output.glob("*.safetensors")) == paths
    assert len(paths) == {2**30: 1, 1: len(source.names())}.get(max_shard_bytes, len(paths))
    assert (len(paths) > 1) == (output / "model.safetensors.index.json").exists() == (max_shard_bytes < 2**30)
    assert not list(output.glob("*.tmp"))
    with safe_open(paths[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    again = open_source(str(output))
    again.check()
    assert again.nbytes == writer.total_bytes == source.nbytes
    ids = torch.arange(32)[None]
    expected, found = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (tmp_path / "m", output))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_more_than_one_shard_is_held(tmp_path):
    writer = ShardWriter(tmp_path, 1000)
    for i in range(20):
        writer.add(f"t{i}", torch.full((60,), float(i)))
        assert sum(t.nbytes for t in writer._pending.values()) <= 1000
    assert len(writer.close()) == 5


def test_slices_and_transposes_are_written_as_they_look(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    writer = ShardWriter(tmp_path)
    expected = {"row": base[1], "other row": base[2], "turned": base.T, "whole": base}
    for name, tensor in expected.items():
        writer.add(name, tensor)
    (path,) = writer.close()
    with safe_open(path, "pt") as file:
        for name, tensor in expected.items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_disk_space_is_checked_on_the_disk_of_a_folder_to_be(tmp_path):
    require_disk({tmp_path / "not" / "yet": 1})
    with pytest.raises(CareError, match=r"1048576\.00 GiB are needed and .* GiB are free"):
        require_disk({tmp_path / "not" / "yet": 2**50})


def test_what_lies_on_one_disk_is_added(tmp_path):
    half = shutil.disk_usage(tmp_path).free * 2 // 3
    require_disk({tmp_path / "a": half})
    with pytest.raises(CareError, match="are needed"):
        require_disk({tmp_path / "a": half, tmp_path / "b": half})


def test_output_appears_only_when_it_is_complete(tmp_path):
    output = tmp_path / "out"
    with atomic_folder(output, overwrite=False) as partial:
        (partial / "config.json").write_text("{}")
        assert partial.parent == tmp_path
        assert not output.exists()
    assert [file.name for file in output.iterdir()] == ["config.json"]
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_leaves_nothing_and_keeps_the_earlier_output(tmp_path, error):
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("old")

    def fail() -> None:
        with atomic_folder(output, overwrite=True) as partial:
            (partial / "config.json").write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert (output / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]


def test_overwrite_replaces_the_whole_folder(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    for name in ("config.json", "stale.safetensors"):
        (output / name).write_text("old")
    with atomic_folder(output, overwrite=True) as partial:
        (partial / "config.json").write_text("new")
    assert [file.read_text() for file in output.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [output]


def test_stale_partial_is_removed_and_an_empty_folder_may_be_filled(tmp_path):
    output, stale = tmp_path / "out", tmp_path / ".out.partial"
    for folder in (output, stale):
        folder.mkdir()
    (stale / "half.safetensors").write_text("half")
    with atomic_folder(output, overwrite=False) as partial:
        assert not list(partial.iterdir())
        (partial / "config.json").write_text("{}")
    assert (output / "config.json").exists()


def enter(output: Path, *, overwrite: bool) -> None:
    with atomic_folder(output, overwrite=overwrite):
        raise AssertionError("entered")


def test_existing_output_is_refused(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(OptionError, match="--overwrite"):
        enter(output, overwrite=False)
    with pytest.raises(OptionError, match="no model folder"):
        enter(output, overwrite=True)
    with pytest.raises(OptionError, match="is a file"):
        enter(output / "notes.txt", overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"
