"""Converted pico models in a real vLLM: the reference's log probabilities, its greedy text, and MLA's cache.

Runs under `make test-vllm`, which builds an environment for vLLM and names it in CARE_VLLM_PYTHON; not under
`make test`. Writes what it found to benchmarks/engines/vllm.json, and the telling lines of vLLM's log.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from care_mla.checkpoint.opening import open_source
from care_mla.configs import VerifyConfig
from care_mla.errors import CareError
from care_mla.export.deepseek import write_deepseek_checkpoint
from care_mla.export.run import export_model
from care_mla.export.verify import judge, read_reference, store_reference, verify
from care_mla.export.vllm import pad_for_vllm
from care_mla.export.vllm_process import PYTHON_VARIABLE, misread, run_vllm
from care_mla.export_config import ExportConfig
from care_mla.workspace import read_json, write_json, write_text
from export_cases import decoupled_layer, export, token_ids

from pico import pico_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

RESULTS = Path(__file__).parents[2] / "benchmarks" / "engines"
FIGURES = (
    *("class", "relative_error", "max_abs_logprob_difference", "greedy_equal", "cached_values", "passed"),
)
# Lines of vLLM's log that say what it runs.
TELLING = re.compile(
    r"Initializing a V1 LLM engine \(v[^)]*\)|Resolved architecture: \w+|Using \w+ backend"
    r"|Using \w+ MLA prefill backend|MLA is enabled|CPU KV cache size: [\d,]+ tokens"
)


class Case(NamedTuple):
    """A source, how many of its frequencies share one pair of the RoPE key, and vLLM's --model-impl."""

    options: dict[str, Any]
    fold: int
    model_impl: str


# What vLLM's own class would drop or misread runs in transformers' class inside vLLM.
CASES: dict[str, Case] = {
    "llama": Case({}, 2, "vllm"),
    "llama, untied, eps 1e-6": Case({"tied": False, "rms_norm_eps": 1e-6}, 4, "vllm"),
    "mistral, head_dim 128": Case({"family": "mistral", "tied": False, "head_dim": 128}, 2, "vllm"),
    "llama, transformers' class": Case({}, 2, "transformers"),
    "llama with llama3 RoPE, transformers' class": Case(
        {"rope": "llama3", "head_dim": 64}, 1, "transformers"
    ),
    "qwen2 with biases, transformers' class": Case({"family": "qwen2"}, 2, "transformers"),
}


@pytest.fixture(scope="module")
def results() -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
    """Rows and log lines; written when all tests of the file have run."""
    assert os.environ.get(PYTHON_VARIABLE), "run these tests by: make test-vllm"
    rows: list[dict[str, Any]] = []
    log: list[str] = []
    yield rows, log
    if len(rows) == len(CASES):
        (versions,) = {tuple(row.pop("versions").items()) for row in rows}
        body = {"format": "care-mla/engine-vllm/1", "versions": dict(versions), "rows": rows}
        write_json(RESULTS / "vllm.json", body)
        write_text(RESULTS / "vllm.log", "\n".join(log) + "\n")


def padded(tmp_path: Path, options: dict[str, Any], fold: int, *, own_head: bool) -> Path:
    """512 + 64 cached values and the head dims of the profile `vllm`, with biases and scaled tables too."""
    source = open_source(str(pico_model(tmp_path / "source", tokenizer=False, **options)))
    layers = [decoupled_layer(source, seed, fold=fold) for seed in range(2)]
    theta = source.facts.rope_theta
    wide = [pad_for_vllm(layer, rope_theta=theta, kv_lora_rank=512) for layer in layers]
    write_deepseek_checkpoint(source, wide.__getitem__, tmp_path / "out", torch.float32, own_head=own_head)
    store_reference(tmp_path / "out", source, layers.__getitem__, token_ids(), cached_values=576)
    return tmp_path / "out"


@pytest.mark.parametrize("name", CASES)
def test_vllm_gives_the_references_log_probabilities(name: str, tmp_path, results) -> None:
    rows, log = results
    options, fold, model_impl = CASES[name]
    folder = padded(tmp_path, options, fold, own_head=model_impl == "vllm")
    start = time.perf_counter()
    stored = read_reference(folder)
    tensors, metadata = run_vllm(folder, stored, model_impl=model_impl, log=tmp_path / "log")
    seconds = round(time.perf_counter() - start, 1)
    body = judge(stored, tensors, metadata)
    output = (tmp_path / "log").read_text(encoding="utf-8")
    log += [f"# {name}", *dict.fromkeys(found.group() for found in TELLING.finditer(output))]
    rows.append(
        {"case": name, "model_impl": model_impl, "seconds": seconds}
        | {key: body[key] for key in FIGURES}
        | {key: metadata[key] for key in ("uses_mla", "cache", "dtype", "versions")}
    )
    assert body["passed"], body["problems"]
    assert body["max_abs_logprob_difference"] < 1e-3
    assert body["relative_error"] < 1e-5
    assert body["greedy_equal"] is True
    assert metadata["dtype"] == "float32"
    # What vLLM itself says: its configuration, the cache that it lays out, and its log.
    assert metadata["uses_mla"] is True
    assert metadata["cache"] == ["MLAAttentionSpec"]
    assert metadata["cached_values"] == [576, 576]
    assert "Using CPU_MLA backend" in output


@pytest.mark.parametrize("options", [{"family": "qwen2", "tied": False}, {}], ids=["biases", "tied head"])
def test_what_vllms_own_class_drops_is_seen_and_avoided(options: dict[str, Any], tmp_path) -> None:
    folder = padded(tmp_path, options, 2, own_head=False)
    stored = read_reference(folder)
    body = judge(stored, *run_vllm(folder, stored, model_impl="vllm"))
    assert not body["passed"]
    assert body["relative_error"] > 0.1
    assert misread(read_json(folder / "config.json")) is not None


def test_an_exported_folder_passes_and_a_size_without_kernel_is_named(tmp_path) -> None:
    converted, output = export(tmp_path, tokenizer=False).folder, tmp_path / "vllm"
    with pytest.raises(CareError, match=r"here they are 20 and 8.*--profile vllm --kv-lora-rank 512"):
        verify(VerifyConfig(model=converted, engine="vllm"))
    export_model(ExportConfig(model=converted, output=output, profile="vllm", kv_lora_rank=512, quiet=True))
    body = verify(VerifyConfig(model=output, engine="vllm"))
    assert body["passed"], body["problems"]
    assert (body["engine"], body["cached_values"]) == ("vllm", 576)
