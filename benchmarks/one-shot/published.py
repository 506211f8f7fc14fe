"""Methods at the settings of published code, where candidates are fixed and nothing is chosen.

The official TransMLA and CARE code (alpaca, 32 x 256 tokens, freqfold 4) was measured on the first 16,384
tokens of WikiText-2's raw test file: README.md says what it got.

    python benchmarks/one-shot/published.py --calibration alpaca.json --perplexity wiki.test.raw \
        --json published.json
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from care_mla import console
from care_mla.calibrate.layers import LayerStack
from care_mla.calibrate.run import calibrate
from care_mla.checkpoint.opening import open_source
from care_mla.configs import CompareConfig
from care_mla.decompose.layer_inputs import CalibratedLayers
from care_mla.decompose.methods import Variant
from care_mla.device import pick_device
from care_mla.evaluate.perplexity import token_blocks
from care_mla.mla.choose import spread
from care_mla.mla.divergence import measure
from care_mla.versions import versions
from care_mla.workspace import Workspace, write_json

# (method, form, R, P, freqfold) at half of 384 cached values.
SETTINGS = (
    ("transmla", "decoupled", 128, 64, 4),
    ("transmla", "decoupled", 160, 32, 4),
    ("svd-llm", "exact-rope", 192, 0, None),
    ("care-u", "exact-rope", 192, 0, None),
    ("fisher", "decoupled", 128, 64, None),
    ("fisher", "decoupled", 160, 32, None),
    ("fisher", "exact-rope", 192, 0, None),
)


def main() -> None:
    """Measure every setting and write the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--work", type=Path, default=Path("care-work-published"))
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--perplexity", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    start = time.perf_counter()
    console.silence_transformers()
    source = open_source(arguments.model)
    stack = LayerStack(source, device=pick_device(None))
    workspace = Workspace(arguments.work)
    options = CompareConfig(
        model=arguments.model,
        calibration=arguments.calibration,
        calibration_tokens=32 * 256,
        sequence_length=256,
        seed=42,
    )
    blocks = calibrate(stack, options, workspace, console.current())
    inputs = CalibratedLayers(
        source, workspace, stack.inv_freq_F, damping=options.damping, device=stack.device
    )
    tokens_BL = token_blocks(source.tokenizer(), arguments.perplexity, block=1024, max_tokens=16_384)
    choices = [
        spread(
            Variant(method=method, form=form, kv_lora_rank=rank, qk_rope_head_dim=width, freqfold=freqfold),
            "uniform",
            stack.num_layers,
        )
        for method, form, rank, width, freqfold in SETTINGS
    ]
    named = {choice.label: choice.layer(inputs) for choice in choices}
    with console.current().progress("Measuring", stack.num_layers + 1) as progress:
        original, measured = measure(stack, named, tokens_BL, progress.advance)
    rows = [
        {
            "method": choice.variant.method,
            "form": choice.variant.form,
            "kv_lora_rank": choice.kv_lora_rank,
            "qk_rope_head_dim": choice.variant.qk_rope_head_dim,
            "freqfold": choice.variant.freqfold,
            "perplexity": measured[choice.label].perplexity,
            "kl": measured[choice.label].mean_kl,
        }
        for choice in choices
    ]
    write_json(
        arguments.json,
        {
            "format": "care-mla/published-settings/1",
            "versions": versions(),
            "seconds": round(time.perf_counter() - start, 3),
            "calibration": {"description": blocks.description, "content_hash": blocks.content_hash},
            "original": {"perplexity": original.perplexity},
            "rows": rows,
        },
    )
    table = [[r["method"], r["form"], r["qk_rope_head_dim"], r["perplexity"], r["kl"]] for r in rows]
    console.current().table("Published settings", ["method", "form", "P", "perplexity", "KL"], table)


if __name__ == "__main__":
    main()
