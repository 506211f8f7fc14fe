"""Every family in every profile and engine: a pico model converted, exported and verified, and what came out.

benchmarks/engines/run_families.py writes the outcomes down, docs/models.md is made from them, and
tests/e2e/test_family_cells.py finds them again.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from care_mla import ConvertConfig, console, convert
from care_mla.checkpoint.opening import open_source
from care_mla.configs import Form, VerifyConfig
from care_mla.errors import CareError
from care_mla.export.engine_transformers import run
from care_mla.export.profile import TARGETS
from care_mla.export.run import export_model
from care_mla.export.verify import judge, read_reference, verify
from care_mla.export_config import ExportConfig
from care_mla.facts import ModelFacts
from care_mla.profiles import profile_blocker

from pico import PARTIAL_LONGROPE, USUAL_YARN, pico_model, pico_text

EXACT, APPROXIMATE, REFUSED, NOT_RUN = "exact", "approximate", "refused", "not run"
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}


class Row(NamedTuple):
    """A model of the table: what `pico_model` makes, options of `care convert`, a case of vllm.json."""

    model: dict[str, Any]
    options: dict[str, Any] = {}  # noqa: RUF012
    vllm_case: str | None = None


class Column(NamedTuple):
    """A cell's form, profile and engine. Engines are named as in `care verify`."""

    form: Form
    profile: str
    engine: str


ROWS: dict[str, Row] = {
    "Llama": Row({"family": "llama"}, vllm_case="llama"),
    "Llama, `llama3` RoPE": Row(
        {"family": "llama", "rope": "llama3"}, vllm_case="llama with llama3 RoPE, transformers' class"
    ),
    "Llama, `llama3` RoPE, `--rope-table plain`": Row(
        {"family": "llama", "rope": "llama3"}, {"rope_table": "plain"}
    ),
    "Llama, `yarn` RoPE": Row({"family": "llama", "rope": USUAL_YARN}),
    "Llama, `linear` RoPE": Row({"family": "llama", "rope": "linear"}),
    "Llama, `longrope` RoPE": Row({"family": "llama", "rope": "longrope"}),
    "Llama, attention biases": Row({"family": "llama", "attention_bias": True}),
    "Llama, MLP biases": Row({"family": "llama", "mlp_bias": True}),
    "Mistral": Row({"family": "mistral", "tied": False}, vllm_case="mistral, head_dim 128"),
    "Mistral, sliding window": Row({"family": "mistral", "sliding_window": 32}),
    "Mixtral": Row({"family": "mixtral", "tied": False}),
    "Phi-3": Row({"family": "phi3", "tied": False}),
    "Phi-3, partial rotary": Row({"family": "phi3", "rope": PARTIAL_ROPE, "tied": False}),
    "Phi-3, partial rotary, `longrope` RoPE, `--rope-table scaled`": Row(
        {"family": "phi3", "rope": PARTIAL_LONGROPE, "tied": False}, {"rope_table": "scaled"}
    ),
    "Qwen2": Row({"family": "qwen2"}, vllm_case="qwen2 with biases, transformers' class"),
    "Qwen2, `--biases absorb`": Row({"family": "qwen2"}, {"biases": "absorb"}),
    "Qwen3": Row({"family": "qwen3"}),
    # With seed 0 the router finds two experts alike to 3e-6 at one token, and engines differ in their choice.
    "Qwen3-MoE": Row({"family": "qwen3_moe", "tied": False, "seed": 1}),
    "OLMo 2": Row({"family": "olmo2", "tied": False}),
}
COLUMNS = (
    Column("decoupled", "deepseek-v3", "transformers"),
    Column("decoupled", "deepseek-v2", "transformers"),
    Column("decoupled", "mistral4", "transformers"),
    Column("decoupled", "vllm", "transformers"),
    Column("decoupled", "vllm", "vllm"),
    Column("decoupled", "gguf", "llama.cpp"),
    Column("decoupled", "care", "transformers"),
    Column("exact-rope", "care", "transformers"),
)
# How messages of `care` say why not.
REASON = re.compile(
    r"(?:cannot express this \w+ model(?: \((?P<profile>.*)\)|: (?P<form>.*))|--profile \w+: (?P<size>[^.]*))"
    r"\. Nothing was written"
)


class Measured(NamedTuple):
    """What became of one model: its facts, what its decoupled form approximates, and its cells."""

    facts: ModelFacts
    needs_healing: list[str]
    cells: dict[Column, dict[str, Any]]


def reason_of(error: CareError) -> str:
    """Why a model has no conversion, in the words that the command has for it."""
    found = REASON.search(str(error))
    assert found is not None, error
    return found["profile"] or found["form"] or found["size"]


def measure(row: Row, folder: Path) -> Measured:
    """Convert a pico model to both forms, export it to every profile, and verify all of them.

    Every cell has a `status`; `exact` and `approximate` ones have the `relative_error` of what the engine
    computes, `approximate` ones the `kl` to the original on held-out text too, `refused` ones a `reason`.
    What is written but another model in this engine is refused there, with the error that it would have.
    """
    pico_model(folder / "model", **row.model)
    (folder / "text.txt").write_text(pico_text(5000))
    facts = open_source(str(folder / "model"), weights=False).facts
    cells: dict[Column, dict[str, Any]] = {}
    healing: list[str] = []
    try:
        body = _convert(row, folder, "decoupled", None)
    except CareError as error:
        cells |= {
            c: {"status": REFUSED, "reason": reason_of(error)} for c in COLUMNS if c.form == "decoupled"
        }
    else:
        healing = body["needs_healing"]
        kl = {"kl": body["held_out_kl"]} if healing else {}
        for column in COLUMNS:
            if column.form != "decoupled":
                continue
            if column.engine == "vllm":
                cells[column] = _in_vllm(facts, row.options)
            elif column.profile == body["profile"]:
                cells[column] = _cell(body["verify"], kl)
            elif column.profile == "care":
                own = _convert(row, folder, "decoupled", "care")
                cells[column] = _cell(own["verify"], {"kl": own["held_out_kl"]} if healing else {})
            else:
                cells[column] = _export(facts, folder, column, kl)
    exact = _convert(row, folder, "exact-rope", None)
    assert not exact["needs_healing"]
    cells[Column("exact-rope", "care", "transformers")] = _cell(exact["verify"], {})
    return Measured(facts, healing, {column: cells[column] for column in COLUMNS})


def _convert(row: Row, folder: Path, form: Form, profile: str | None) -> dict[str, Any]:
    return convert(
        ConvertConfig(
            model=str(folder / "model"),
            output=folder / f"{form} {profile}",
            work=folder / "work",
            calibration=str(folder / "text.txt"),
            calibration_tokens=1024,
            sequence_length=128,
            form=form,
            profile=profile,  # type: ignore[arg-type]
            allocation="uniform",
            device="cpu",
            quiet=True,
            **(row.options if form == "decoupled" else {}),
        )
    )


def _cell(verdict: dict[str, Any], kl: dict[str, float]) -> dict[str, Any]:
    assert verdict["passed"], verdict["problems"]
    return {"status": APPROXIMATE if kl else EXACT, "relative_error": verdict["relative_error"], **kl}


def _export(facts: ModelFacts, folder: Path, column: Column, kl: dict[str, float]) -> dict[str, Any]:
    assert column.engine in TARGETS[column.profile].engines  # type: ignore[index]
    output = folder / f"exported.{column.profile}"
    console.current().warnings.clear()
    config = ExportConfig(model=folder / "decoupled None", output=output, profile=column.profile, quiet=True)  # type: ignore[arg-type]
    try:
        export_model(config)
    except CareError as error:
        return {"status": REFUSED, "reason": reason_of(error)}
    if column.engine == "transformers":
        # A fresh process takes two seconds; that the engine needs none of ours is tested elsewhere.
        verdict = judge(read_reference(output), *run(output))
    else:
        verdict = verify(VerifyConfig(model=output, engine=column.engine, quiet=True))  # type: ignore[arg-type]
    other = [text for text in console.current().warnings if "another model" in text]
    if not other:
        return _cell(verdict, kl)
    reason = profile_blocker(facts, column.profile, engine=column.engine)  # type: ignore[arg-type]
    assert reason is not None
    assert reason in other[0]
    assert not verdict["passed"]
    return {"status": REFUSED, "reason": reason, "relative_error": verdict["relative_error"]}


def _in_vllm(facts: ModelFacts, options: dict[str, Any]) -> dict[str, Any]:
    """What `--profile vllm` says; the figures of vLLM itself are those of vllm.json."""
    reason = profile_blocker(
        facts,
        "vllm",
        plain_rope=options.get("rope_table") != "scaled",
        absorbs_biases=options.get("biases") == "absorb",
    )
    return {"status": NOT_RUN} if reason is None else {"status": REFUSED, "reason": reason}


def as_json(measured: Measured) -> list[dict[str, Any]]:
    """The cells of one model as families.json holds them."""
    return [{**column._asdict(), **cell} for column, cell in measured.cells.items()]
