"""`care inspect MODEL`: what a model is and whether it can be converted, from its configuration alone."""
# Letters: R kv_lora_rank, P qk_rope_head_dim.

from __future__ import annotations

import time
from typing import Any, Literal, get_args

from care_mla import console
from care_mla.budget import cached_values, resolve_dims
from care_mla.cli.options import parse
from care_mla.cli.result import finish
from care_mla.configs import Form, InspectConfig, PlanConfig, Profile
from care_mla.errors import OptionError, UnsupportedModelError
from care_mla.facts import ModelFacts
from care_mla.families.effects import has_biases
from care_mla.families.rope_table import has_choice
from care_mla.forms import form_blocker, needs_healing
from care_mla.profiles import profile_blocker
from care_mla.serving import fast_budgets, kernel_summary

BUDGETS = (1.0, 0.5, 0.25, 0.125)
PROFILES: tuple[tuple[Profile | Literal["gguf"], str], ...] = (
    ("deepseek-v3", "transformers"),
    ("deepseek-v3", "vLLM"),
    ("vllm", "vLLM"),
    ("deepseek-v3", "SGLang"),
    ("mistral4", "transformers"),
    ("deepseek-v2", "transformers"),
    ("deepseek-v2", "vLLM"),
    ("deepseek-v2", "SGLang"),
    ("gguf", "llama.cpp"),
    ("care", "transformers"),
)


def run(arguments: list[str]) -> int:
    """Run the command; returns its exit code: 2 where the model cannot be converted."""
    start = time.perf_counter()
    config = parse(InspectConfig, "inspect", arguments)
    from care_mla.checkpoint.opening import open_source

    try:
        facts = open_source(config.model, weights=False).facts
    except UnsupportedModelError as error:
        finish(
            config, "inspect", start, {"model": config.model, "supported": False, "blocked_by": str(error)}
        )
        raise
    body = describe(facts)
    _print(config.model, facts, body)
    finish(config, "inspect", start, {"model": config.model, "supported": True} | body)
    return 0


def describe(facts: ModelFacts) -> dict[str, Any]:
    """What the command tells about a model that can be converted, as its JSON holds it."""
    return {
        "family": facts.family,
        "architecture": facts.architecture,
        "num_hidden_layers": facts.num_hidden_layers,
        "hidden_size": facts.hidden_size,
        "num_attention_heads": facts.num_attention_heads,
        "num_key_value_heads": facts.num_key_value_heads,
        "head_dim": facts.head_dim,
        "vocab_size": facts.vocab_size,
        "max_position_embeddings": facts.max_position_embeddings,
        "rope_type": facts.rope_type,
        "sliding_window": facts.sliding_window,
        "num_experts": facts.num_experts,
        "num_experts_per_tok": facts.num_experts_per_tok,
        "biases": [
            name for name in ("q_bias", "k_bias", "v_bias", "o_bias", "mlp_bias") if getattr(facts, name)
        ],
        "qk_norm": facts.qk_norm,
        "dtype": facts.dtype,
        "cached_values": facts.cached_values,
        "ranks": [row for budget in _budgets(facts) for row in _ranks(facts, budget)],
        "forms": [_form(facts, form) for form in get_args(Form)],
        "profiles": [
            _profile(facts, profile, engine, options)
            for profile, engine in PROFILES
            for options in _options(facts, profile)
        ],
    }


def _budgets(facts: ModelFacts) -> list[float]:
    """Halves, and those of the sizes that vLLM's fast kernels take, largest first."""
    return sorted({*BUDGETS, *fast_budgets(facts).values()}, reverse=True)


def _ranks(facts: ModelFacts, budget: float) -> list[dict[str, Any]]:
    """Possible (R, P) at one budget; none where it is too small.

    Of the decoupled form, or of exact-rope where that one is impossible.
    """
    form: Form = "decoupled" if form_blocker(facts, "decoupled") is None else "exact-rope"
    options = PlanConfig(model="", budget=budget, form=form)
    try:
        candidates = resolve_dims(facts, options, form=form, method=options.method)
    except OptionError:
        return []
    return [
        {
            **dims._asdict(),
            "form": form,
            "budget": budget,
            "cached_values": cached_values(facts, form, dims),
            "vllm_kernels": kernel_summary(facts, dims) if form == "decoupled" else "-",
        }
        for dims in candidates
    ]


def _form(facts: ModelFacts, form: Form) -> dict[str, Any]:
    blocker = form_blocker(facts, form)
    reasons = [] if blocker else needs_healing(facts, form)
    return {"form": form, "possible": blocker is None, "blocked_by": blocker, "needs_healing": reasons}


def _form_answer(row: dict[str, Any]) -> str:
    if not row["possible"]:
        return f"no: {row['blocked_by']}"
    if row["needs_healing"]:
        return f"approximate, needs healing: {'; '.join(row['needs_healing'])}"
    return "yes, exact but for the rank" if row["form"] == "exact-rope" else "yes"


def _options(facts: ModelFacts, profile: str) -> list[str]:
    """Options that change which engines run this profile, each combination as the user would type it."""
    tables = ["--rope-table scaled", "--rope-table plain"] if has_choice(facts) else [""]
    biases = ["", "--biases absorb"] if has_biases(facts) and not facts.o_bias else [""]
    if profile not in ("deepseek-v3", "vllm", "gguf"):
        return [""]
    return [f"{table} {option}".strip() for table in tables for option in biases]


def _profile(
    facts: ModelFacts, profile: Profile | Literal["gguf"], engine: str, options: str
) -> dict[str, Any]:
    blocker = profile_blocker(
        facts,
        # llama.cpp's class has both of DeepSeek's routers.
        "deepseek-v2" if profile == "gguf" else profile,
        engine=engine,
        plain_rope="plain" in options,
        absorbs_biases="absorb" in options,
    )
    return {
        "profile": profile,
        "engine": engine,
        "options": options,
        "possible": blocker is None,
        "blocked_by": blocker,
    }


def _print(model: str, facts: ModelFacts, body: dict[str, Any]) -> None:
    terminal = console.current()
    biases = ", ".join(body["biases"]) or "none"
    rows = [
        ["architecture", f"{facts.architecture} (family {facts.family}): can be converted"],
        ["layers x hidden size", f"{facts.num_hidden_layers} x {facts.hidden_size}"],
        ["query heads, KV heads", f"{facts.num_attention_heads}, {facts.num_key_value_heads}"],
        ["head_dim", facts.head_dim],
        ["positions", f"{facts.max_position_embeddings:,} (RoPE: {facts.rope_type})"],
        ["sliding window", facts.sliding_window],
        [
            "experts",
            f"{facts.num_experts}, {facts.num_experts_per_tok} per token" if facts.num_experts else None,
        ],
        ["biases", biases],
        ["QK-norm", {"head": "over each head", "full": "over all heads", None: "none"}[facts.qk_norm]],
        ["stored as", facts.dtype],
        ["cached values per token and layer", facts.cached_values],
        ["cache, bytes per token (16 bit)", 2 * facts.num_hidden_layers * facts.cached_values],
    ]
    terminal.table(model, ["", "value"], rows)
    ranks = [
        [
            f"{row['budget']:g}",
            row["kv_lora_rank"],
            row["qk_rope_head_dim"],
            row["cached_values"],
            row["vllm_kernels"],
        ]
        for row in body["ranks"]
    ]
    columns = ["--budget", "kv_lora_rank", "qk_rope_head_dim", "cached values", "decode in vLLM"]
    form = next((row["form"] for row in body["ranks"]), "decoupled")
    terminal.table(f"Possible sizes of an MLA cache (--form {form})", columns, ranks)
    terminal.table("Forms", ["form", "possible"], [[row["form"], _form_answer(row)] for row in body["forms"]])
    profiles = [
        [
            f"{row['profile']} {row['options']}".strip(),
            row["engine"],
            "yes" if row["possible"] else f"no: {row['blocked_by']}",
        ]
        for row in body["profiles"]
    ]
    terminal.table("Profiles", ["profile and options", "engine", "exact"], profiles)
