"""The `care` profile on disk: what is written, and that it runs where care_mla cannot be imported."""
# Shapes: see care_mla/mla/latent_attention.py.

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from care_mla.checkpoint.opening import open_source
from care_mla.checkpoint.source import Source
from care_mla.errors import UnsupportedModelError
from care_mla.export.hf import CODE, CODE_FILES, write_latent_checkpoint
from care_mla.factors import LatentLayer
from care_mla.families.rope import rotary_frequencies

from pico import pico_model

IDS = [[5, 9, 200, 31, 7, 77, 12, 150, 42, 3]]
SOURCES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "rope": "llama3"},
    "llama-biases-untied": {"family": "llama", "attention_bias": True, "tied": False},
    "mistral": {"family": "mistral", "tied": False, "sliding_window": 6},
    "qwen2": {"family": "qwen2"},
}
# Loads the folder, runs it in one go and with a cache, and prints what came out.
FRESH = """
import json, sys
sys.modules["care_mla"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model, info = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, dtype="auto", output_loading_info=True
)
text = AutoTokenizer.from_pretrained(folder, trust_remote_code=True).decode(ids[0])
options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=1)
with torch.no_grad():
    print(json.dumps({
        "logits": model(ids).logits.float().tolist(),
        "cached": model.generate(ids, **options).tolist(),
        "recomputed": model.generate(ids, use_cache=False, **options).tolist(),
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "inv_freq": str(model.model.layers[0].self_attn.inv_freq.dtype),
        "problems": [list(info[f"{key}_keys"]) for key in ("missing", "unexpected", "mismatched")],
        "text": text,
    }))
"""


@pytest.fixture(params=SOURCES)
def source(request, tmp_path) -> Source:
    return open_source(str(pico_model(tmp_path / "source", **SOURCES[request.param])))


def full_rank(source: Source, layer_idx: int) -> LatentLayer:
    """Exact-rope whose latent is the keys and values, so that the output must be the source's."""
    facts, tensors = source.facts, source.layer(layer_idx)
    groups, head_dim = facts.num_key_value_heads, facts.head_dim

    def heads(name: str) -> Tensor | None:
        return tensors[name].unflatten(0, (-1, head_dim)) if name in tensors else None

    eye = torch.eye(2 * groups * head_dim).unflatten(0, (2 * groups, head_dim))
    return LatentLayer(
        form="exact-rope",
        down_RD=torch.cat((tensors["self_attn.k_proj.weight"], tensors["self_attn.v_proj.weight"])),
        up_k_GMR=eye[:groups],
        up_v_GHR=eye[groups:],
        q_rope_NPD=heads("self_attn.q_proj.weight"),
        inv_freq_JF=torch.tensor([rotary_frequencies(facts)]),
        q_rope_bias_NP=heads("self_attn.q_proj.bias"),
        k_bias_GM=heads("self_attn.k_proj.bias"),
        v_bias_GH=heads("self_attn.v_proj.bias"),
    )


def run_fresh(folder: Path, modules: Path) -> dict[str, Any]:
    environment = os.environ | {
        "HF_MODULES_CACHE": str(modules),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder), json.dumps(IDS)],
        env=environment, capture_output=True, text=True, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def test_fresh_process_gives_the_sources_logits(source, tmp_path):
    write_latent_checkpoint(source, lambda i: full_rank(source, i), tmp_path / "out", torch.float32)
    fresh = run_fresh(tmp_path / "out", tmp_path / "modules")
    model = AutoModelForCausalLM.from_pretrained(source.name, dtype=torch.float32)
    assert_close(torch.tensor(fresh["logits"]), model(torch.tensor(IDS)).logits, atol=1e-4, rtol=1e-4)
    expected = model.generate(
        torch.tensor(IDS), max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=1
    )
    assert fresh["cached"] == fresh["recomputed"] == expected.tolist()
    assert fresh["class"] == "Latent" + source.facts.architecture
    assert fresh["problems"] == [[], [], []]
    assert fresh["text"] == source.tokenizer().decode(IDS[0])


def test_bfloat16_with_a_rank_for_each_layer(tmp_path):
    source = open_source(str(pico_model(tmp_path / "source", layers=3)))
    ranks = (24, 10, 16)

    def layer(layer_idx: int) -> LatentLayer:
        rank, full = ranks[layer_idx], full_rank(source, layer_idx)
        cut = {"down_RD": full.down_RD[:rank], "up_k_GMR": full.up_k_GMR[..., :rank]}
        return replace(full, **cut, up_v_GHR=full.up_v_GHR[..., :rank])

    out = tmp_path / "out"
    write_latent_checkpoint(source, layer, out, torch.bfloat16)
    config = json.loads((out / "config.json").read_text())
    assert config["kv_lora_rank"] == list(ranks)
    assert config["latent_form"] == "exact-rope"
    assert config["architectures"] == ["LatentLlamaForCausalLM"]
    fresh = run_fresh(out, tmp_path / "modules")
    assert fresh["dtype"] == "torch.bfloat16"
    assert fresh["inv_freq"] == "torch.float32"
    assert fresh["problems"] == [[], [], []]


def test_every_other_tensor_passes_through(source, tmp_path):
    write_latent_checkpoint(source, lambda i: full_rank(source, i), tmp_path / "out", torch.float32)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        written = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    untouched = {n for n in source.names() if ".self_attn." not in n or ".o_proj." in n}
    assert untouched == {n for n in written if ".self_attn." not in n or ".o_proj." in n}
    for name in untouched:
        assert torch.equal(written[name], source.tensor(name)), name


def test_refused_before_anything_is_written(tmp_path):
    source = open_source(str(pico_model(tmp_path / "source")))
    source.facts = replace(source.facts, architecture="OlmoForCausalLM")
    with pytest.raises(UnsupportedModelError, match="OlmoForCausalLM"):
        write_latent_checkpoint(source, lambda i: full_rank(source, i), tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", CODE_FILES)
def test_code_in_the_checkpoint_needs_only_torch_and_transformers(file):
    imported = set()
    for node in ast.walk(ast.parse((CODE / file).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." + node.module if node.level else node.module.split(".")[0])
    assert imported <= {"__future__", "dataclasses", "typing", "torch", "transformers"} | {
        ".configuration",
        ".latent_attention",
    }
