"""What each part of the decoupled default contributes, on the statistics that `care compare` left behind.

Run after compare, with the same text:

    python benchmarks/one-shot/ablations.py --work care-work --perplexity wiki.test.raw --json ablations.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from care_mla import console
from care_mla.calibrate.layers import LayerStack
from care_mla.checkpoint.opening import open_source
from care_mla.decompose.decouple import decouple
from care_mla.decompose.fisher import damp_blocks, decoupled_latent, felt_covariance
from care_mla.decompose.layer_inputs import CalibratedLayers, LayerInputs
from care_mla.device import pick_device
from care_mla.evaluate.perplexity import token_blocks
from care_mla.factors import LatentLayer
from care_mla.mla.divergence import measure
from care_mla.versions import versions
from care_mla.workspace import Workspace, write_json


def layer(
    inputs: LayerInputs,
    width: int,
    rank: int,
    *,
    fisher: bool = True,
    felt: bool = True,
    **split: bool,
) -> LatentLayer:
    """One layer of the default, with some of its parts switched off."""
    fisher_OO = damp_blocks(
        inputs.fisher_nope_OO, inputs.num_kv_heads * inputs.head_dim, inputs.fisher_damping
    )
    c_DD = felt_covariance(inputs) if felt else inputs.damped_c_DD
    return decoupled_latent(
        inputs, decouple(inputs, width, **split), c_DD, fisher_OO if fisher else None
    ).cut((rank,))


PARTS: dict[str, dict[str, bool]] = {
    "default": {},
    "no folding": {"fold": False},
    "no gamma": {"use_gamma": False},
    "no query weights": {"query_weights": False},
    "no felt covariance": {"felt": False},
    "no Fisher weights": {"fisher": False, "felt": False},
    "none of them": {"fisher": False, "felt": False, "use_gamma": False, "query_weights": False},
}


def main() -> None:
    """Measure every part switched off, at each width of the rope key, and write the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--perplexity", type=Path, required=True)
    parser.add_argument("--block", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--cached-values", type=int, default=192)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    start = time.perf_counter()
    console.silence_transformers()
    source = open_source(arguments.model)
    stack = LayerStack(source, device=pick_device(None))
    inputs = CalibratedLayers(
        source, Workspace(arguments.work), stack.inv_freq_F, damping=0.01, device=stack.device
    )
    tokens_BL = token_blocks(
        source.tokenizer(), arguments.perplexity, block=arguments.block, max_tokens=arguments.max_tokens
    )
    head_dim = source.facts.head_dim
    candidates: dict[str, Callable[[int], LatentLayer]] = {}
    settings = []
    for width in (head_dim, head_dim // 2):
        rank = arguments.cached_values - width
        for name, switched in PARTS.items():
            if width == head_dim and name == "no folding":
                continue
            settings.append((f"P{width} R{rank} {name}", width, rank, name))
            candidates[settings[-1][0]] = lambda i, w=width, r=rank, s=switched: layer(inputs[i], w, r, **s)
    steps = stack.num_layers + 1
    with console.current().progress("Measuring", steps) as progress:
        original, measured = measure(stack, candidates, tokens_BL, progress.advance)
    rows = [
        {
            "part": name,
            "qk_rope_head_dim": width,
            "kv_lora_rank": rank,
            "perplexity": measured[label].perplexity,
            "kl": measured[label].mean_kl,
        }
        for label, width, rank, name in settings
    ]
    result = {
        "format": "care-mla/ablations/1",
        "versions": versions(),
        "seconds": round(time.perf_counter() - start, 3),
        "original": {"perplexity": original.perplexity},
        "rows": rows,
    }
    write_json(arguments.json, result)
    table = [
        [row["part"], row["qk_rope_head_dim"], row["kv_lora_rank"], row["perplexity"], row["kl"]]
        for row in rows
    ]
    console.current().table("Ablations", ["part", "P", "R", "perplexity", "KL"], table)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
