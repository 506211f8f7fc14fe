"""Results of every command as JSON, small and made up, for tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEAD = {
    "versions": {"care_mla": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
    "seconds": 12.5,
    "warnings": [],
}
VERIFY = {
    "engine": "transformers",
    "class": "DeepseekV3ForCausalLM",
    "relative_error": 7.6e-07,
    "max_abs_logprob_difference": 5e-05,
    "greedy_equal": True,
    "cached_values": 192,
    "kl_to_original": 0.265,
    "layers_compared": 4,
    "passed": True,
    "problems": [],
}


def layer(idx: int, *, separate: bool = False) -> dict[str, Any]:
    """One of the rows that `convert` writes for each layer: of a joint latent, or of `separate` K and V."""
    spectrum = [0.5 ** (i / (3 + idx)) for i in range(16)]
    return {
        "rank": 8,
        "cached_values": 12,
        "ranks": [5, 3 + idx] if separate else [8],
        "predicted_error": 0.01 * (idx + 1),
        "spectrum": [spectrum, spectrum[::2] * 2] if separate else spectrum,
        "gamma": [0.1 * i for i in range(8)],
    }


def conversion(layers: int = 4, *, separate: bool = False) -> dict[str, Any]:
    """What `care convert` writes, of a model with two query heads."""
    return {
        "model": "models/original",
        "cached_values": {"original": 384, "converted": 192},
        "kv_lora_rank": 160,
        "qk_rope_head_dim": 32,
        "form": "exact-rope" if separate else "decoupled",
        "method": "fisher",
        "allocation": "uniform",
        "profile": "deepseek-v3",
        "engines": {"transformers": True, "vllm": "tied embeddings", "llama.cpp": True},
        "held_out_kl": 0.1926,
        "candidates": [
            {"candidate": "decoupled fisher R128 P64 uniform", "kl": 0.25, "chosen": False},
            {"candidate": "decoupled fisher R160 P32 uniform", "kl": 0.1926, "chosen": True},
        ],
        "needs_healing": [],
        "output": "care-demo/model",
        "stages": {"check": 1.5, "calibrate": 60.25},
        "peak_memory_bytes": 3 * 2**30,
        "layers": [
            layer(i, separate=separate)
            | {
                "match": {"error_before": 0.2 / (i + 1), "error_after": 0.1 / (i + 1)},
                "rope_kept": [0.9, 0.4],
            }
            for i in range(layers)
        ],
        "match": {"steps": 8, "tokens": 4096, "held_out_kl": {"before": 0.25, "after": 0.2}, "kept": True},
        "verify": VERIFY,
        "recipe": "model: models/original\nbudget: 0.5\n",
        "fingerprints": {"source weights": "f4ab20b994bd07a3", "calibration tokens": "1e1776037a75922e"},
    }


def comparison(budget: int = 192, scale: float = 1.0) -> dict[str, Any]:
    """What `care compare` writes."""
    found = {
        ("fisher", "decoupled"): 38.7,
        ("transmla", "decoupled"): 69.6,
        ("fisher", "exact-rope"): 31.6,
        ("svd", "exact-rope"): 30731.4,
    }
    return {
        "original": {"perplexity": 29.19, "cached_values": 384},
        "rows": [
            {
                "method": method,
                "form": form,
                "allocation": "uniform",
                "kv_lora_rank": budget - 32,
                "qk_rope_head_dim": 32,
                "cached_values": budget,
                "perplexity": value * scale,
                "kl": 0.25,
                "seconds": 1.0,
            }
            for (method, form), value in found.items()
        ],
        "text": {"name": "wiki.test.raw", "tokens": 8184, "block": 1024},
    }


def evaluation() -> dict[str, Any]:
    """What `care evaluate` writes of an original and a converted model."""
    original = evaluated("models/original", 384, 14.27)
    converted = evaluated("care-demo/model", 192, 16.92)
    converted["perplexity"]["text"] |= {
        "kl": 0.21,
        "kl_stderr": 0.01,
        "difference": {"nll": 0.17, "nll_stderr": 0.01, "perplexity_ratio": 1.186},
    }
    converted["tasks"]["arc_easy"]["difference"] = {"acc": {"value": -0.06, "stderr": 0.034}}
    converted["needle"]["difference"] = {"value": 0.0, "stderr": 0.0}
    return {"models": [original, converted]}


def evaluated(name: str, cached: int, value: float) -> dict[str, Any]:
    """One of the models that `care evaluate` measures."""
    return {
        "model": name,
        "cached_values": cached,
        "cache_bytes_per_token": 120 * cached,
        "speed": {"prefill_tokens_per_second": 812.5, "decode_tokens_per_second": 21.25},
        "perplexity": {
            "text": {
                "value": value,
                "tokens": 4088,
                "block": 512,
                "by_position": [
                    {"start": start, "end": start + 256, "value": value + start / 256} for start in (0, 256)
                ],
            }
        },
        "tasks": {"arc_easy": {"acc": 0.55, "acc_stderr": 0.04, "items": 100, "chance": 0.25}},
        "needle": {
            "lengths": [1024, 2048],
            "depths": [0.0, 0.5, 1.0],
            "score": [[1.0, 0.5, 1.0], [0.0, 0.25, 1.0]],
            "mean": 0.625,
            "mean_stderr": 0.1,
            "haystack": "essays.txt",
        },
        "passkey": None,
    }


def healing() -> dict[str, Any]:
    """What `care heal` writes."""
    return {
        "steps": [{"step": i, "loss": 0.3 / i, "kl": 0.3 / i} for i in range(1, 6)],
        "measurements": [{"step": 0, "kl": 0.3}, {"step": 5, "kl": 0.1}],
        "tokens_per_step": 2048,
        "held_out": {"before": 0.3, "after": 0.1},
        "verify": VERIFY,
    }


BODIES: dict[str, dict[str, Any]] = {
    "convert": conversion(),
    "compare": comparison(),
    "evaluate": evaluation(),
    "heal": healing(),
    "verify": VERIFY,
    "generate": {
        "prompt": "What is <gravity>?",
        "models": [
            {"model": "models/original", "text": "A force."},
            {"model": "care-demo/model", "text": "A pull & a law."},
        ],
    },
    "inspect": {"model": "models/original", "supported": True, "family": "llama", "num_hidden_layers": 4},
    "bench": {
        "what": "decode",
        "device": "cpu",
        "rows": [{"model": "demo", "metric": "decode", "context": 256, "median": 20.5, "spread": 0.4}],
    },
}


def write_result(path: Path, command: str, body: dict[str, Any], *, version: int = 1) -> None:
    """Write a file as `command --json` does."""
    path.write_text(json.dumps({"format": f"care-mla/{command}/{version}", **HEAD, **body}))


def folder_with(folder: Path, *commands: str) -> Path:
    """A folder with one result of each of these commands."""
    for command in commands:
        write_result(folder / f"{command}.json", command, BODIES[command])
    return folder


def write_results(folder: Path) -> None:
    """One result of every command, and a second comparison at half the size."""
    for command, body in BODIES.items():
        write_result(folder / f"{command}.json", command, body)
    write_result(folder / "compare-quarter.json", "compare", comparison(96, scale=2.0))


def write_large_results(folder: Path) -> None:
    """Results of a model with 80 layers and 64 heads, under long names; 16 methods; prompts of 1 K to 1 M."""
    body = conversion(80)
    for row in body["layers"]:
        row["gamma"] = [i / 63 for i in range(64)]
        row["rope_kept"] = [0.5 + i / 130 for i in range(64)]
        row["spectrum"] = [0.99**i for i in range(512)]
    name = "a-company-with-a-name/its-largest-model-of-all-times-120B-instruct"
    write_result(folder / "convert.json", "convert", body | {"model": name, "output": f"{name}-mla-half"})
    models = [evaluated(f"{name}{end}", 384, 14.27) for end in ("", "-mla-half", "-mla-half-healed-40M")]
    lengths = [1024 * 2**i for i in range(11)]
    for model in models:
        score = [[abs(i - 5) / 5, 1.0, 0.0, 0.5, 1.0] for i in range(11)]
        model["needle"] |= {"lengths": lengths, "depths": [0, 0.25, 0.5, 0.75, 1], "score": score}
    write_result(folder / "evaluate.json", "evaluate", {"models": models})
    for budget in (48, 96, 144, 192, 288):
        rows = [
            {"method": f"method-{i}-of-16", "form": form, "cached_values": budget, "perplexity": value}
            for form in ("decoupled", "exact-rope")
            for i, value in enumerate([30 + i * 2000 / budget for i in range(14)] + [40_000.0, float("inf")])
        ]  # fmt: skip
        write_result(folder / f"compare-{budget}.json", "compare", comparison() | {"rows": rows})
    write_result(folder / "heal.json", "heal", healing() | {"warnings": [f"--work {name} is long. " * 4]})
