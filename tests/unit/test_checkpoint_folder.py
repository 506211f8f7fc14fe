from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config

from care_mla.checkpoint.opening import open_source
from care_mla.checkpoint.source import HEAD
from care_mla.errors import CareError, CheckpointError, OptionError, UnsupportedModelError
from care_mla.families import weight_names

from pico import CLASSES, pico_model, pico_text

WEIGHT = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    return pico_model(tmp_path / "m")


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Rewrite a one-file checkpoint with other tensors; `__` in a name stands for a dot, None removes."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor
    save_file(weights, path, metadata={"format": "pt"})


def edit_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# Those whose files are spelled otherwise are in test_spelling.py.
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("shards", [1, 3])
def test_source_gives_the_weights_of_the_model(tmp_path, family, shards):
    folder = pico_model(tmp_path / "m", family, shards=shards, tied=family == "llama", dtype=torch.bfloat16)
    assert len(list(folder.glob("*.safetensors"))) >= shards
    source = open_source(str(folder))
    source.check()
    source.check_values()
    expected = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).named_parameters())
    assert source.names() == list(weight_names(source.facts))
    assert set(source.names()) == expected.keys()
    for name, parameter in expected.items():
        assert source.dtype(name) == torch.bfloat16
        assert source.shape(name) == tuple(parameter.shape)
        torch.testing.assert_close(source.tensor(name), parameter.data, rtol=0, atol=0)
    layer = source.layer(1)
    assert layer.keys() == {
        n.removeprefix("model.layers.1.") for n in expected if n.startswith("model.layers.1.")
    }
    assert source.nbytes == sum(p.nbytes for p in expected.values())
    assert source.name == str(folder)


def test_progress_counts_every_tensor(folder):
    seen: list[tuple[int, int]] = []
    source = open_source(str(folder))
    source.check_values(lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(source.names())) for i in range(len(source.names()))]


def test_opening_reads_the_configuration_alone(folder):
    (folder / "model.safetensors").write_bytes(b"nothing of use")
    source = open_source(str(folder))
    assert source.facts.hidden_size == 64
    with pytest.raises(CheckpointError, match=r"model\.safetensors: corrupt"):
        source.check()


def test_missing_shard_is_named(tmp_path):
    folder = pico_model(tmp_path / "m", shards=3)
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        open_source(str(folder)).check()


def test_shards_of_another_checkpoint_are_refused(tmp_path):
    folder = pico_model(tmp_path / "m", shards=3)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(CheckpointError, match=r"is in model-00001.* too|it is not"):
        open_source(str(folder)).check()
    second.write_bytes(content)
    with pytest.raises(CheckpointError, match="different checkpoints"):
        open_source(str(folder)).check()


def test_shards_without_an_index_are_refused(tmp_path):
    folder = pico_model(tmp_path / "m", shards=3)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json"):
        open_source(str(folder)).check()


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file_is_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: corrupt.*truncated"):
        open_source(str(folder)).check()


def test_file_with_a_tail_is_refused(folder):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="too long"):
        open_source(str(folder)).check()


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        b"[1, 2]",
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-8, -4]}}',
        b'{"a": {"dtype": "F32", "shape": "12", "data_offsets": [0, 4]}}',
    ],
)
def test_corrupt_header_is_refused(folder, header):
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match="corrupt"):
        open_source(str(folder)).check()


@pytest.mark.parametrize(
    ("value", "named"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (-float("inf"), "Inf")]
)
def test_values_that_are_not_finite_are_named(folder, value, named):
    weight = load_file(folder / "model.safetensors")[WEIGHT]
    weight[3, 5] = value
    change(folder, **{WEIGHT: weight})
    source = open_source(str(folder))
    source.check()
    with pytest.raises(CheckpointError, match=f"{WEIGHT} holds 1 {named}"):
        source.check_values()


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({WEIGHT: None}, f"missing tensor {WEIGHT}"),
        ({"model.layers.2.input_layernorm.weight": torch.ones(64)}, "unknown tensor model.layers.2"),
        ({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, "unknown tensor .*q_norm"),
        ({WEIGHT: torch.ones(64, 64)}, rf"{WEIGHT} has shape \[64, 64\].*\[32, 64\]"),
        ({HEAD: torch.ones(7, 64)}, r"lm_head.weight has shape \[7, 64\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, tensors, named):
    change(folder, **tensors)
    with pytest.raises(CheckpointError, match=named):
        open_source(str(folder)).check()


def test_redundant_tensors_are_listed_and_left_out(folder):
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(folder, **{buffer: torch.ones(8), HEAD: embedding.clone()})
    source = open_source(str(folder))
    source.check()
    source.check_values()
    assert sorted(source.ignored()) == [HEAD, buffer]
    assert not {HEAD, buffer} & set(source.names())


def test_tied_head_that_differs_is_refused(folder):
    change(folder, **{HEAD: torch.ones(320, 64)})
    source = open_source(str(folder))
    source.check()
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        source.check_values()


def test_quantised_tensor_is_refused_by_name(folder):
    change(folder, **{WEIGHT: torch.ones(32, 64, dtype=torch.int8)})
    with pytest.raises(UnsupportedModelError, match=f"{WEIGHT} is stored as I8"):
        open_source(str(folder)).check()


def test_pickles_are_refused_by_name(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        open_source(str(folder))


@pytest.mark.parametrize("content", ["{", "[]"])
def test_unreadable_config_is_named(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_source(str(folder))


def test_folder_without_config_or_weights_is_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        open_source(str(folder)).check()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        open_source(str(folder))


@pytest.mark.parametrize("model", ["", "./nothing", "/nowhere/at/all", "nothing.gguf", "a/b/c"])
def test_path_that_is_not_there_never_asks_the_hub(model):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_source(model)


def test_hub_id_that_cannot_be_had_says_what_to_do(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"hf download no-such-owner/no-such-model --local-dir"):
        open_source("no-such-owner/no-such-model")
    with pytest.raises(OptionError, match="neither a file, a folder nor a hub id"):
        open_source("two words")


def test_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="Name the folder"):
        open_source(str(tmp_path / "model.safetensors"))


def test_fingerprint_follows_weights_and_config_not_the_place(folder, tmp_path):
    first = open_source(str(folder)).fingerprint()
    moved = folder.rename(tmp_path / "elsewhere")
    assert open_source(str(moved)).fingerprint() == first
    weight = load_file(moved / "model.safetensors")[WEIGHT]
    weight[0, 0] += 1e-6
    change(moved, **{WEIGHT: weight})
    second = open_source(str(moved)).fingerprint()
    assert second != first
    edit_config(moved, rms_norm_eps=1e-4)
    assert open_source(str(moved)).fingerprint() not in (first, second)


def test_fingerprint_of_a_large_file_samples_every_tensor(folder, monkeypatch):
    monkeypatch.setattr("care_mla.checkpoint.fingerprint.FULL_BYTES", 0)
    monkeypatch.setattr("care_mla.checkpoint.fingerprint.SAMPLE_BYTES", 64)
    path = folder / "model.safetensors"
    original = load_file(path)
    seen = {open_source(str(folder)).fingerprint()}
    for name, tensor in original.items():
        changed = tensor + 0.01
        save_file(original | {name: changed}, path, metadata={"format": "pt"})
        seen.add(open_source(str(folder)).fingerprint())
    assert len(seen) == len(original) + 1


@pytest.mark.parametrize("family", list(CLASSES))
def test_tokenizer_survives_in_the_folder_of_another_architecture(tmp_path, family):
    folder = pico_model(tmp_path / "m", family)
    (folder / "LICENSE").write_text("terms")
    source, output = open_source(str(folder)), tmp_path / "out"
    source.save_side_files(output)
    DeepseekV3Config(num_hidden_layers=1).save_pretrained(output)
    text = pico_text(100) + " It's 1234 <|im_end|>\n\n ü🙂"
    ids = source.tokenizer()(text).input_ids
    assert AutoTokenizer.from_pretrained(output)(text).input_ids == ids
    assert source.tokenizer().decode(ids) == text
    assert (output / "LICENSE").read_text() == "terms"
    assert (output / "generation_config.json").read_bytes() == (
        folder / "generation_config.json"
    ).read_bytes()


def test_generation_config_is_built_where_there_is_none(folder, tmp_path):
    (folder / "generation_config.json").unlink()
    open_source(str(folder)).save_side_files(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found == {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1}


def test_missing_tokenizer_matters_only_when_it_is_asked_for(tmp_path):
    source = open_source(str(pico_model(tmp_path / "m", tokenizer=False)))
    source.check()
    source.save_side_files(tmp_path / "out")
    with pytest.raises(CareError, match="no tokenizer"):
        source.tokenizer()


@pytest.mark.parametrize("content", ["", "{}"])
def test_broken_tokenizer_is_the_users_error(folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CareError, match="its tokenizer cannot be loaded"):
        open_source(str(folder)).tokenizer()


def test_unknown_tensor_name_is_refused(folder):
    with pytest.raises(CheckpointError, match=r"no tensor 'lm_head\.weight'"):
        open_source(str(folder)).tensor(HEAD)


def test_opening_a_source_imports_no_transformers(folder):
    code = (
        "import sys; from care_mla.checkpoint.opening import open_source; open_source(sys.argv[1]).check(); "
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 0
