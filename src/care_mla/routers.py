"""Which stock class routes a mixture of experts as the source does, in which engine. No torch.

The sources take the largest of a softmax over the router's logits, divided by their sum or not.
"""

from __future__ import annotations

from care_mla.configs import Profile
from care_mla.facts import ModelFacts


def router_blocker(facts: ModelFacts, profile: Profile, engine: str) -> str | None:
    """Why the class of a stock profile cannot run this source's experts, or not at all; None: it can."""
    if profile == "mistral4" and engine != "transformers":
        return f"{engine} has no class for Mistral 4 under transformers' names"
    if profile == "mistral4" and facts.rope_type != "default":
        return f"rope_type {facts.rope_type}: Mistral 4's class takes a table of its own (yarn)"
    if not facts.sparse_layers:
        return None
    if profile in ("deepseek-v3", "vllm"):
        return "a mixture of experts under a softmax: DeepSeek-V3's router takes a sigmoid"
    if profile == "deepseek-v2" and facts.norm_topk_prob and engine == "transformers":
        return (
            "norm_topk_prob: transformers' DeepSeek-V2 never divides the weights of the chosen experts by "
            "their sum, as vLLM and SGLang do"
        )
    if facts.num_experts < 2:
        return "num_experts 1: stock routers compare the two best experts"
    if len(facts.sparse_layers) != facts.num_hidden_layers - min(facts.sparse_layers):
        return "dense layers behind layers with experts: stock classes have their dense layers first"
    return None
