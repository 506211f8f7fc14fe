"""What llama.cpp makes of a converted model: fidelity, perplexity and cache by type of the weights.

python benchmarks/engines/run_llama_cpp.py --model OUT --perplexity wiki.test.raw --json llama_cpp.json
"""
# Shapes: B sequences, L positions, S vocabulary.

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from care_mla import console
from care_mla.configs import VerifyConfig
from care_mla.evaluate.perplexity import log_probs, token_blocks
from care_mla.export import engine_llama_cpp
from care_mla.export.converted import ConvertedFolder
from care_mla.export.engine_transformers import greedy
from care_mla.export.run import export_model
from care_mla.export.verify import read_reference, verify
from care_mla.export_config import ExportConfig
from care_mla.versions import versions
from care_mla.workspace import write_json

QUANTIZATIONS = ("f32", "bf16", "f16", "q8_0", "q6_k", "q4_k_m")
LOG = engine_llama_cpp.Log()  # llama.cpp calls it as long as the process lives


def nll(log_probs_LS: Tensor, tokens_L: Tensor) -> float:
    """Negative log-likelihood of all tokens of a block but the first."""
    return -log_probs_LS.gather(-1, tokens_L[1:, None]).sum().item()


def perplexity(total: float, tokens_BL: Tensor) -> float:
    """Of a sum of `nll` over blocks."""
    return float(torch.tensor(total / tokens_BL[:, 1:].numel()).exp())


def in_transformers(model: PreTrainedModel, tokens_BL: Tensor) -> float:
    """Perplexity of the converted folder itself."""
    return perplexity(sum(nll(log_probs(model, tokens_L), tokens_L) for tokens_L in tokens_BL), tokens_BL)


def in_llama_cpp(file: Path, tokens_BL: Tensor, model: PreTrainedModel) -> dict[str, Any]:
    """Perplexity of a GGUF file, and the largest relative error of one token's logits to transformers."""
    engine = engine_llama_cpp.Model(file, tokens_BL.shape[1], tokens_BL.shape[1])
    total, largest = 0.0, 0.0
    for block_idx, tokens_L in enumerate(tokens_BL):
        engine.clear()
        logits_LS = torch.from_numpy(engine.logits(tokens_L.tolist()))
        total += nll(logits_LS[:-1].log_softmax(-1), tokens_L)
        if block_idx == 0:
            expected_LS = model(tokens_L[None], use_cache=False).logits[0]
            errors_L = (logits_LS - expected_LS).norm(dim=-1) / expected_LS.norm(dim=-1)
            largest = errors_L.max().item()
    return {"perplexity": perplexity(total, tokens_BL), "largest_token_error": largest}


def row(model: Path, file: Path, quantization: str) -> dict[str, Any]:
    """Export in one type and verify in a process of its own."""
    exported = export_model(
        ExportConfig(model=model, output=file, quantization=quantization, quiet=True)  # type: ignore[arg-type]
    )
    verdict = verify(VerifyConfig(model=file, engine="llama.cpp", quiet=True))
    return {"quantization": quantization, "bytes": exported["bytes"], "verify": verdict}


@torch.no_grad()
def main() -> None:
    """Measure every type and write the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--perplexity", type=Path, required=True)
    parser.add_argument("--block", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    start = time.perf_counter()
    console.silence_transformers()
    folder = ConvertedFolder(arguments.model)
    tokens_BL = token_blocks(
        folder.tokenizer(), arguments.perplexity, block=arguments.block, max_tokens=arguments.max_tokens
    )
    stock = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    stored = read_reference(arguments.model)
    text_T, _ = greedy(stock, stored.tokens_BL[:1], len(stored.greedy_T))
    rows = []
    with TemporaryDirectory(dir=arguments.json.absolute().parent) as temporary:
        for quantization in QUANTIZATIONS:
            file = Path(temporary) / f"{quantization}.gguf"
            measured = row(arguments.model, file, quantization)
            engine = engine_llama_cpp.Model(file, 256, 64)
            found_T = torch.from_numpy(engine.greedy(stored.tokens_BL[0].tolist(), len(text_T)))
            measured["greedy_tokens_equal_to_transformers"] = int((found_T == text_T).long().cumprod(0).sum())
            rows.append(measured | in_llama_cpp(file, tokens_BL, stock))
            console.current().step(f"{quantization}: perplexity {rows[-1]['perplexity']:.4f}")
            file.unlink()
    result = {
        "format": "care-mla/engine-llama-cpp/1",
        "versions": versions() | {"llama-cpp-python": engine_llama_cpp.llama_cpp.__version__},
        "seconds": round(time.perf_counter() - start, 3),
        "text": {"name": arguments.perplexity.name, "block": arguments.block, "tokens": tokens_BL.numel()},
        "greedy_tokens": len(text_T),
        "transformers": {"perplexity": in_transformers(stock, tokens_BL)},
        "rows": rows,
    }
    write_json(arguments.json, result)


if __name__ == "__main__":
    main()
