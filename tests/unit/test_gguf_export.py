"""The profile `gguf` in a real llama.cpp: right files pass, wrong ones fail, the rest is refused."""
# Shapes: see care_mla/export/gguf_model.py.

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from care_mla.checkpoint.opening import open_source
from care_mla.configs import VerifyConfig
from care_mla.errors import CareError, CheckpointError, ExportError, OptionError
from care_mla.export import llama_cpp as engine
from care_mla.export.converted import ConvertedFolder
from care_mla.export.deepseek import write_deepseek_checkpoint
from care_mla.export.gguf_model import MAX_RATIO, attention_tensors, check_gguf, write_gguf
from care_mla.export.hf import write_latent_checkpoint
from care_mla.export.llama_cpp import reference_path
from care_mla.export.run import export_model
from care_mla.export.verify import store_reference, verify
from care_mla.export_config import ExportConfig
from export_cases import decoupled_layer, export, token_ids
from gguf_files import Change, rewrite

from pico import USUAL_YARN, pico_model

CASES: dict[str, dict[str, Any]] = {
    "llama-tied": {},
    "llama-untied-eps-1e-6": {"tied": False, "rms_norm_eps": 1e-6},
    "mistral-one-kv-head": {"family": "mistral", "tied": False, "head_dim": 32, "kv_heads": 1},
    "yarn": {"rope": USUAL_YARN},
    "odd-sizes": {"hidden": 72, "heads": 3, "kv_heads": 3, "head_dim": 12, "vocab": 301},
}


def gguf_of(folder: Path, file: Path, **options: Any) -> dict[str, Any]:
    return export_model(ExportConfig(model=folder, output=file, quiet=True, **options))


def run(file: Path) -> dict[str, Any]:
    return verify(VerifyConfig(model=file, engine="llama.cpp"))


@pytest.mark.parametrize("name", CASES)
def test_float32_gives_the_references_logits(name: str, tmp_path) -> None:
    options = CASES[name]
    vocab = options.get("vocab", 318) + 2
    folder = export(tmp_path, tokens_BL=token_ids(vocab=vocab), **options).folder
    body = gguf_of(folder, tmp_path / "x.gguf")
    assert body["rms_norm_eps"] == pytest.approx(1e-6 * 2**28)
    assert body["quantization"] == "f32"
    found = run(tmp_path / "x.gguf")
    assert found["passed"], found["problems"]
    assert found["engine"] == "llama.cpp"
    assert found["relative_error"] < 1e-5
    assert found["greedy_equal"]
    assert found["cached_values"] == 20 + options.get("head_dim", 16) // 2


def test_own_class_and_no_part_without_rope(tmp_path) -> None:
    """From the profile `care`, whose stream has the original's scale; llama.cpp wants M of 1 at least."""
    exported = export(tmp_path, tied=False)
    layers = [replace(layer, up_k_GMR=layer.up_k_GMR[:, :0], q_nope_NMD=None) for layer in exported.layers]
    write_latent_checkpoint(exported.source, layers.__getitem__, tmp_path / "own", torch.float32)
    store_reference(tmp_path / "own", exported.source, layers.__getitem__, token_ids(), num_greedy=8)
    gguf_of(tmp_path / "own", tmp_path / "x.gguf")
    found = run(tmp_path / "x.gguf")
    assert found["passed"], found["problems"]
    assert found["relative_error"] < 1e-5


@pytest.mark.parametrize(
    ("quantization", "low", "high"),
    [("bf16", 1e-3, 5e-2), ("f16", 1e-4, 1e-2), ("q8_0", 1e-3, 0.1), ("q4_k_m", 1e-2, 0.5)],
)
def test_rounded_types_survive(quantization, low: float, high: float, tmp_path) -> None:
    folder = export(tmp_path, hidden=256, head_dim=32, heads=8).folder
    body = gguf_of(folder, tmp_path / "x.gguf", quantization=quantization)
    found = run(tmp_path / "x.gguf")
    assert found["passed"], found["problems"]
    assert low < found["relative_error"] < high
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    latent = kinds["blk.1.attn_kv_a_mqa.weight"]
    assert latent == {"f16": "F32", "bf16": "BF16"}.get(quantization, "BF16")
    assert kinds["blk.1.ffn_gate.weight"] == quantization.upper().removesuffix("_M")
    assert body["bytes"] == (tmp_path / "x.gguf").stat().st_size
    assert sorted(path.name for path in tmp_path.glob("*x*")) == ["x.gguf", "x.reference.safetensors"]


def test_weights_in_float16_stay_in_its_range(tmp_path) -> None:
    path = pico_model(tmp_path / "source", tokenizer=False)
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 5] *= 300
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    source, folder = open_source(str(path)), tmp_path / "large"
    layers = [decoupled_layer(source, seed) for seed in range(2)]
    write_deepseek_checkpoint(source, layers.__getitem__, folder, torch.float32)
    store_reference(folder, source, layers.__getitem__, token_ids(), num_greedy=4)
    body = gguf_of(folder, tmp_path / "x.gguf", quantization="f16")
    assert body["residual_scale"] < 2**14
    for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors:
        assert np.isfinite(tensor.data.astype(np.float32)).all(), tensor.name
    found = run(tmp_path / "x.gguf")
    assert found["passed"], found["problems"]


def test_bound_of_the_latent(tmp_path) -> None:
    source = open_source(str(pico_model(tmp_path / "source", tokenizer=False)))
    norm_D = 1 + 0.3 * torch.randn(64, dtype=torch.float64)
    tensors, norm = attention_tensors(decoupled_layer(source, 0), norm_D, eps=268.0)
    assert norm.bound <= MAX_RATIO * math.sqrt(268)
    product = norm.down_scale * norm.weight * norm.up_scale / math.sqrt(268)
    assert product == pytest.approx(1, rel=1e-12)
    assert tensors["attn_k_b"].shape == (4, 20, 10)
    assert tensors["attn_v_b"].shape == (4, 16, 20)


def tensor_times(name: str, factor: float) -> Change:
    def change(tensors: dict[str, np.ndarray], keys: dict[str, Any]) -> None:
        tensors[name] = tensors[name] * np.float32(factor)

    return change


def no_norm(tensors: dict[str, np.ndarray], keys: dict[str, Any]) -> None:
    tensors["blk.1.attn_norm.weight"][:] = 1


def other_eps(tensors: dict[str, np.ndarray], keys: dict[str, Any]) -> None:
    keys["deepseek2.attention.layer_norm_rms_epsilon"] *= 10


def half_split(tensors: dict[str, np.ndarray], keys: dict[str, Any]) -> None:
    rows = tensors["blk.0.attn_kv_a_mqa.weight"]
    rows[20:] = np.concatenate((rows[20::2], rows[21::2]))


def other_theta(tensors: dict[str, np.ndarray], keys: dict[str, Any]) -> None:
    keys["deepseek2.rope.freq_base"] /= 2


def no_merge(tensors: dict[str, np.ndarray], keys: dict[str, Any]) -> None:
    keys["tokenizer.ggml.merges"] = keys["tokenizer.ggml.merges"][:-40]


def stray_bos(tensors: dict[str, np.ndarray], keys: dict[str, Any]) -> None:
    keys["tokenizer.ggml.add_bos_token"] = True


MUTATIONS: dict[str, Change] = {
    "nothing": lambda tensors, keys: None,
    "no-norm": no_norm,
    "final-norm-of-a-tied-model": tensor_times("output_norm.weight", 2**14),
    "eps": other_eps,
    "latent-norm": tensor_times("blk.0.attn_kv_a_norm.weight", math.sqrt(10)),
    "half-split-rope": half_split,
    "theta": other_theta,
    "scale-of-queries": tensor_times("blk.0.attn_q.weight", math.sqrt(16 / 18)),
    "merges": no_merge,
    "bos": stray_bos,
}


@pytest.fixture(scope="module")
def exported_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    gguf_of(export(folder).folder, folder / "x.gguf")
    return folder / "x.gguf"


@pytest.mark.parametrize("name", MUTATIONS)
def test_wrong_files_fail(name: str, exported_file: Path, tmp_path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(exported_file.read_bytes())
    reference_path(file).write_bytes(reference_path(exported_file).read_bytes())
    rewrite(file, MUTATIONS[name])
    body = run(file)
    assert body["passed"] is (name == "nothing")
    if name in ("merges", "bos"):
        assert "other token ids" in body["problems"][0]
    elif name != "nothing":
        assert "relative error" in body["problems"][0]


def test_a_cache_of_another_size_fails(exported_file: Path, tmp_path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(exported_file.read_bytes())
    with safe_open(reference_path(exported_file), "pt") as stored:
        metadata = json.loads(stored.metadata()["care_reference"]) | {"cached_values": [28, 27]}
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    save_file(tensors, reference_path(file), {"care_reference": json.dumps(metadata)})
    body = run(file)
    assert body["problems"] == ["cached values [28, 28], expected [28, 27]"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "qwen2"}, r"attention biases: llama\.cpp.*care verify"),
        ({"attention_bias": True}, r"attention biases: llama\.cpp"),
        (
            {"rope": USUAL_YARN | {"beta_fast": 33.0}},
            r"beta_fast 33 and beta_slow 1: llama\.cpp computes with 32 and 1.*care verify",
        ),
        ({"rope": "llama3"}, r"rope_type llama3.*llama\.cpp.*care verify"),
    ],
)
def test_models_that_llama_cpp_cannot_express(options: dict[str, Any], message: str, tmp_path) -> None:
    folder = export(tmp_path, tokenizer=False, **options).folder
    with pytest.raises(ExportError, match=message):
        gguf_of(folder, tmp_path / "x.gguf")
    assert not list(tmp_path.glob("*x.*"))


def test_a_plain_table_of_a_scaled_model_is_fine(tmp_path) -> None:
    """What the folder says counts, not what the original was."""
    exported = export(tmp_path, tokenizer=False, rope="llama3")
    width = exported.layers[0].qk_rope_head_dim
    plain_JF = 1e4 ** (-2 * torch.arange(width // 2, dtype=torch.float64)[None] / width)
    layers = [replace(layer, inv_freq_JF=plain_JF) for layer in exported.layers]
    write_latent_checkpoint(exported.source, layers.__getitem__, tmp_path / "own", torch.float32)
    store_reference(tmp_path / "own", exported.source, layers.__getitem__, token_ids(), num_greedy=8)
    gguf_of(tmp_path / "own", tmp_path / "x.gguf")
    assert run(tmp_path / "x.gguf")["passed"]


def test_unknown_tensors_are_refused(tmp_path) -> None:
    folder = export(tmp_path, tokenizer=False).folder
    model = ConvertedFolder(folder)
    model.headers["model.layers.0.mlp.gate.weight"] = model.headers["model.norm.weight"]
    with pytest.raises(ExportError, match=r"mlp\.gate\.weight: a dense deepseek2"):
        check_gguf(model, torch.float32)


def test_a_name_without_a_folder(tmp_path) -> None:
    folder = export(tmp_path, tokenizer=False).folder
    code = (
        "from pathlib import Path; from care_mla import ExportConfig, export_model; "
        f"export_model(ExportConfig(model=Path({str(folder)!r}), output=Path('demo.gguf'), quiet=True))"
    )
    (tmp_path / "here").mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "here", check=True)
    assert (tmp_path / "here" / "demo.gguf").is_file()
    with pytest.raises(OptionError, match=r"exists already.*--overwrite"):
        gguf_of(folder, tmp_path / "here" / "demo.gguf")
    gguf_of(folder, tmp_path / "here" / "demo.gguf", overwrite=True)


def test_nothing_is_left_of_a_failure(tmp_path) -> None:
    folder = export(tmp_path, tokenizer=False).folder

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(ConvertedFolder(folder), interrupted, tmp_path / "x.gguf", torch.float32)
    reference_path(tmp_path / "x.gguf").write_text("of somebody else")
    with pytest.raises(OptionError, match=r"x\.reference\.safetensors exists already"):
        gguf_of(folder, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_files_that_cannot_be_verified(exported_file: Path, tmp_path) -> None:
    with pytest.raises(OptionError, match=r"no \.gguf file.*care export .*gguf && care verify"):
        run(tmp_path)
    with pytest.raises(OptionError, match=r"file for llama\.cpp.*--engine llama\.cpp"):
        verify(VerifyConfig(model=exported_file))
    file = tmp_path / "y.gguf"
    file.write_bytes(exported_file.read_bytes())
    with pytest.raises(CheckpointError, match=r"y\.reference\.safetensors is missing.*care export"):
        run(file)
    reference_path(file).write_bytes(reference_path(exported_file).read_bytes())
    file.write_bytes(exported_file.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"cannot load or run it.*care export"):
        run(file)


def test_absent_and_old_engines(exported_file: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(engine, "MINIMUM", (99, 0, 0))
    with pytest.raises(CareError, match=r"99\.0\.0 or newer.*care-mla\[llama-cpp\]"):
        run(exported_file)
    folder = export(tmp_path, tokenizer=False).folder
    with pytest.raises(CareError, match=r"--quantization q8_0 needs.*care-mla\[llama-cpp\]"):
        gguf_of(folder, tmp_path / "x.gguf", quantization="q8_0")
    assert not list(tmp_path.glob("*x.*"))
    gguf_of(folder, tmp_path / "x.gguf")  # needs no llama.cpp
    # In a Python that finds none at all.
    code = (
        "import sys; sys.modules['llama_cpp'] = None; sys.path.insert(0, '');"
        "from care_mla.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["verify", str(exported_file), "--engine", "llama.cpp"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'care-mla[llama-cpp]'" in " ".join(done.stderr.split())
