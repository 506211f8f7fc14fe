"""Which profile can express a model, and in which engine it is then exact: known from its facts. No torch."""

from __future__ import annotations

from dataclasses import replace

from care_mla.budget import MAX_ROPE_HEAD_DIM
from care_mla.configs import PlanConfig, Profile
from care_mla.engines import ENGINES, engine_blocker
from care_mla.errors import ExportError
from care_mla.facts import ModelFacts
from care_mla.families.effects import has_biases
from care_mla.families.rope_table import decoupled_rope
from care_mla.routers import router_blocker
from care_mla.serving import head_dim_blocker

# In the order in which they are tried: the first serves most engines, the last transformers alone.
STOCK_PROFILES: tuple[Profile, ...] = ("deepseek-v3", "deepseek-v2", "mistral4")


def profile_blocker(
    facts: ModelFacts,
    profile: Profile,
    *,
    engine: str = "transformers",
    plain_rope: bool = False,
    absorbs_biases: bool = False,
) -> str | None:
    """Why a profile cannot express this model exactly in an engine; None where it can.

    Stock profiles have no sliding window, no MLP bias and no norm after a block anywhere, and attention
    biases and most scaled RoPE in transformers alone; each has a router of its own. What depends on more than
    the model (form, ranks, dtype) is checked in export/deepseek.py, which asks here first.

    Args:
        engine: by its name in `engines.ENGINES`.
        plain_rope: whether the rope key turns by plain RoPE's angles (--rope-table plain).
        absorbs_biases: whether biases go into the weights (--biases absorb).
    """
    if profile == "vllm":
        engine = "vLLM"
    facts = _converted(facts, plain_rope=plain_rope, absorbs_biases=absorbs_biases)
    if profile == "care":
        return None if engine == "transformers" else "our own class runs in transformers"
    if facts.sliding_window is not None and facts.sliding_window < facts.max_position_embeddings:
        return f"sliding_window {facts.sliding_window}: DeepSeek's attention sees all positions"
    if facts.is_post_norm:
        return "norms come after attention and MLP: DeepSeek's layers have them before"
    if facts.mlp_bias:
        return "mlp_bias: DeepSeek's MLP has no biases"
    if (router := router_blocker(facts, profile, engine)) is not None:
        return router
    rope = decoupled_rope(facts, min(facts.rotary_dim, MAX_ROPE_HEAD_DIM), plain=False)
    biased = facts.o_bias or has_biases(facts)
    if (reason := engine_blocker({"attention_bias": biased, "rope_parameters": rope}, engine)) is not None:
        return reason
    if profile == "vllm" and rope["rope_type"] != "default":
        return f"rope_type {facts.rope_type}: only plain RoPE goes into the wider key of vLLM's kernels"
    if profile != "vllm" and engine == "vLLM" and facts.tie_word_embeddings:
        return "tied embeddings: vLLM's DeepSeek class wants a head of its own, which profile vllm writes"
    return head_dim_blocker(facts) if profile == "vllm" else None


def _converted(facts: ModelFacts, *, plain_rope: bool, absorbs_biases: bool) -> ModelFacts:
    plain = decoupled_rope(facts, 2, plain=True)
    return replace(
        facts,
        rope_parameters=plain if plain_rope else facts.rope_parameters,
        q_bias=facts.q_bias and not absorbs_biases,
        k_bias=facts.k_bias and not absorbs_biases,
        v_bias=facts.v_bias and not absorbs_biases,
    )


def as_converted(facts: ModelFacts, config: PlanConfig) -> ModelFacts:
    """The facts that the options leave: what a profile has to express."""
    # vLLM's own class reads no other table, so there `auto` is plain.
    tables = ("auto", "plain") if config.profile == "vllm" else ("plain",)
    return _converted(facts, plain_rope=config.rope_table in tables, absorbs_biases=config.biases == "absorb")


def engine_verdicts(facts: ModelFacts, profile: Profile) -> dict[str, bool | str]:
    """For each engine, True where it runs a written folder exactly, else why not.

    llama.cpp runs what `care export --profile gguf` makes of the folder, which has V2's routers.

    Args:
        facts: of the folder as written.
        profile: of the folder.
    """
    profiles: dict[str, Profile] = {"llama.cpp": "deepseek-v2"}
    return {
        key: profile_blocker(facts, profiles.get(key, profile), engine=name) or True
        for key, name in ENGINES.items()
    }


def _unblocking(facts: ModelFacts, profile: Profile, engine: str) -> str | None:
    """The options of `care convert` with which the profile can express the model."""
    for options, plain, absorb in (
        ("--rope-table plain", True, False),
        ("--biases absorb", False, True),
        ("--rope-table plain --biases absorb", True, True),
    ):
        if not profile_blocker(facts, profile, engine=engine, plain_rope=plain, absorbs_biases=absorb):
            return options
    return None


def stock_profile(facts: ModelFacts) -> tuple[Profile | None, str]:
    """The stock profile that transformers runs exactly, and why there is none or not the usual one."""
    reasons = {profile: profile_blocker(facts, profile) for profile in STOCK_PROFILES}
    found = next((profile for profile, reason in reasons.items() if reason is None), None)
    usual = reasons["mistral4" if facts.sparse_layers and found is None else "deepseek-v3"]
    return found, usual or ""


def check_profile(facts: ModelFacts, profile: Profile, *, engine: str = "transformers") -> None:
    """Refuse a profile that cannot express the model in an engine, before any work.

    Raises:
        ExportError: the message names the feature.
    """
    blocker = profile_blocker(facts, profile, engine=engine)
    if blocker is not None:
        stock, _ = stock_profile(facts)
        instead = "" if stock is None else f"--profile {stock}, which stock transformers runs, or "
        instead += "--profile care, our own transformers class, which keeps it exactly."
        if profile == "vllm" and stock == "deepseek-v3":
            instead = (
                "--profile deepseek-v3, and serve it by transformers' class inside vLLM: vllm serve OUT "
                "--model-impl transformers"
            )
        if profile == "vllm" and facts.sparse_layers:
            instead = "--profile deepseek-v2, the class that vLLM has for such experts, or " + instead
        options = _unblocking(facts, profile, engine)
        convert = "" if options is None else f"Convert the original with {options}, at a measured cost. Or c"
        raise ExportError(
            f"--profile {profile} cannot express this {facts.family} model ({blocker}). Nothing was written. "
            f"{convert or 'C'}hoose {instead}"
        )
