"""docs/models.md: which models convert, in which profile and engine, from families and measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from care_mla.families.registry import BLOCKERS, FAMILIES

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "models.md"
INTRODUCTION = """# Models

Made by `python benchmarks/tables.py` from the families in the code and from
[families.json](../benchmarks/engines/families.json) and [vllm.json](../benchmarks/engines/vllm.json).
`make test` measures every cell again in transformers and llama.cpp, `make test-vllm` those in vLLM. To ask
about one model: `care inspect MODEL`.

A number is the relative error of the engine's logits, in float32, against the float64 reference of the
converted model: the export is exact up to rounding. It says nothing of what the smaller cache costs, which
is the rank's doing and is measured by `care compare`. **needs healing** marks a step beside the rank that is
not exact, with the divergence (KL, nats per token) of that conversion from its original. These are random
models of two layers, far more sensitive than real ones: the KL shows that it is measured, not what to expect.

"""
BEHIND = """
## What is refused

By name, before any work, with exit code 2. These well-known architectures, by the start of their name:

"""


def models_page() -> str:
    """The whole page."""
    measured = json.loads((HERE / "engines" / "families.json").read_text(encoding="utf-8"))["rows"]
    vllm = json.loads((HERE / "engines" / "vllm.json").read_text(encoding="utf-8"))["rows"]
    in_vllm = {row["case"]: row for row in vllm}
    reasons: list[str] = []
    first = next(iter(measured.values()))["cells"]
    heads = [f"`{cell['profile']}`, {cell['form']}, {cell['engine']}" for cell in first]
    lines = [["model", *heads], ["---"] * (1 + len(heads))]
    for name, row in measured.items():
        said = [_cell(cell, in_vllm.get(row["vllm_case"]), reasons) for cell in row["cells"]]
        lines.append([name, *said])
    table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    notes = "".join(f"{i}. {reason}\n" for i, reason in enumerate(reasons, start=1))
    supported = ", ".join(f"`{name}`" for name in FAMILIES)
    refused = "".join(f"- `{name}`: {reason}\n" for name, reason in BLOCKERS.items())
    return (
        f"{INTRODUCTION}Architectures: {supported}.\n\n{table}\n*No* means refused, for the reason with that "
        "number; *not run* that the profile takes the model, but vLLM was not asked.\n\n"
        f"{notes}{BEHIND}{refused}"
    )


def _cell(cell: dict[str, Any], in_vllm: dict[str, Any] | None, reasons: list[str]) -> str:
    match cell["status"]:
        case "exact":
            return f"{cell['relative_error']:.0e}"
        case "approximate":
            return f"{cell['relative_error']:.0e}, needs healing: KL {cell['kl']:.2g}"
        case "refused":
            if cell["reason"] not in reasons:
                reasons.append(cell["reason"])
            return f"no ({reasons.index(cell['reason']) + 1})"
        case _:
            fits = in_vllm is not None and in_vllm["model_impl"] == "vllm"
            return f"{in_vllm['relative_error']:.0e}" if fits and in_vllm is not None else "not run"
