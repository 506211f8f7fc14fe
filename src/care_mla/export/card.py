"""The model card of a converted model: what it is, how to load it, what was measured, how to redo it.

A function of its arguments alone. Writes `README.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from care_mla.configs import Form, Profile
from care_mla.workspace import write_text

TAGS = ["mla", "multi-head-latent-attention", "kv-cache", "care"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """Everything that a card says.

    Args:
        name: of the converted model; its title, and what the lines that load it name.
        original: the source model, as the user named it.
        base_model: its hub id, if it has one.
        license: the source's, as the hub spells it, if known.
        kv_lora_rank: one number, or one per layer.
        cached_values: per token and layer, of the original and of the converted model.
        kl_held_out: mean KL(original || converted), nats per token, on held-out calibration text.
        perplexity: on the same text, of the original and of the converted model.
        rope_kl: the same KL of the best conversion with the source's RoPE table (`scaled`), and with plain
            RoPE's (`plain`), where there was a choice.
        bias_kl: the same KL with biases as they are (`keep`), and absorbed into weights (`absorb`).
        engines: True for those that run it exactly, else why not.
        needs_healing: the steps beside the rank that were not exact.
        verify: what `care verify` found, if it ran.
        recipe: from `recipe_text`.
        versions: of the software that decides the numbers.
        fingerprints: of what the result depends on, such as the source's weights and the calibration text.
        warnings: what the run warned about.
    """

    name: str
    original: str
    base_model: str | None = None
    license: str | None = None
    profile: Profile
    form: Form
    method: str
    kv_lora_rank: int | Sequence[int]
    qk_rope_head_dim: int
    cached_values: tuple[float, float]
    kl_held_out: float | None = None
    perplexity: tuple[float, float] | None = None
    rope_kl: Mapping[str, float] | None = None
    bias_kl: Mapping[str, float] | None = None
    engines: Mapping[str, bool | str] = field(default_factory=dict)
    needs_healing: Sequence[str] = field(default_factory=tuple)
    verify: Mapping[str, Any] | None = None
    recipe: str
    versions: Mapping[str, str | None]
    fingerprints: Mapping[str, str]
    warnings: Sequence[str] = field(default_factory=tuple)


def write_card(folder: Path, card: Card) -> None:
    """Write `README.md` into a folder."""
    write_text(folder / "README.md", card_text(card))


def card_text(card: Card) -> str:
    """The whole card as Markdown with YAML front matter."""
    parts = [
        _front_matter(card),
        f"# {card.name}",
        _summary(card),
        _loading(card),
        _figures(card),
        _list(
            "Engines",
            [f"{name}: {'yes' if said is True else f'no, {said}'}" for name, said in card.engines.items()],
        ),
        _list("Needs healing", card.needs_healing),
        _list("Warnings", card.warnings),
        f"## Recipe\n\nThe same options give the same files:\n\n```yaml\n{card.recipe.strip()}\n```",
        _list("Versions", [f"{name} {value or 'not installed'}" for name, value in card.versions.items()]),
        _list("Fingerprints", [f"{name}: `{value}`" for name, value in card.fingerprints.items()]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(card: Card) -> str:
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": TAGS}
    if card.base_model is not None:
        head["base_model"] = card.base_model
    if card.license is not None:
        head["license"] = card.license
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"


def _summary(card: Card) -> str:
    before, after = card.cached_values
    ranks = card.kv_lora_rank
    rank = f"{ranks}" if isinstance(ranks, int) else f"{min(ranks)} to {max(ranks)}, by layer"
    rope = f" and a RoPE key of {card.qk_rope_head_dim}" if card.qk_rope_head_dim else ""
    return (
        f"[{card.original}](https://huggingface.co/{card.base_model})" if card.base_model else card.original
    ) + (
        " with its attention turned into Multi-head Latent Attention by `care`: each layer caches a latent "
        f"of {rank} values per token{rope}, {after / before:.0%} of what the original caches. Form "
        f"{card.form}, method {card.method}. All other weights are the original's."
    )


def _loading(card: Card) -> str:
    is_stock = card.profile == "deepseek-v3"
    option = "" if is_stock else ", trust_remote_code=True"
    how = (
        "Stock transformers (5.15 or later) runs it as `DeepseekV3ForCausalLM`:"
        if is_stock
        else "It runs in transformers (5.15 or later) by the code in this folder, `modeling.py` and "
        "`configuration.py`, which `trust_remote_code` allows:"
    )
    return (
        f"{how}\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f'model = AutoModelForCausalLM.from_pretrained("{card.name}"{option})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{card.name}")\n```'
    )


def _figures(card: Card) -> str:
    before, after = card.cached_values
    rows = [("cached values per token and layer", f"{before:g}", f"{after:g}")]
    if card.perplexity is not None:
        was, now = card.perplexity
        rows.append(("perplexity, held-out calibration text", f"{was:.4g}", f"{now:.4g}"))
    if card.kl_held_out is not None:
        rows.append(("KL to the original on it, nats per token", "0", f"{card.kl_held_out:.4g}"))
    beside = {
        "with the original's RoPE table, for transformers alone": (card.rope_kl or {}).get("scaled"),
        "with plain RoPE's table, for every engine": (card.rope_kl or {}).get("plain"),
        "with biases kept, for transformers alone": (card.bias_kl or {}).get("keep"),
        "with biases absorbed into weights, for every engine": (card.bias_kl or {}).get("absorb"),
    }
    rows += [(f"the same KL {how}", "0", f"{kl:.4g}") for how, kl in beside.items() if kl is not None]
    lines = ["| | original | converted |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "## Measured\n\n" + "\n".join(lines) + _verdict(card.verify)


def _verdict(verify: Mapping[str, Any] | None) -> str:
    if verify is None:
        return "\n\nThe export has not been verified: run `care verify FOLDER`."
    passed = "passed" if verify["passed"] else f"**failed** ({'; '.join(verify.get('problems', ()))})"
    return (
        f"\n\nReloaded in {verify['engine']} and compared with an independent float64 forward of the same "
        f"factors: {passed}. Relative error of logits {verify['relative_error']:.2g}, largest difference of "
        f"a log probability {verify['max_abs_logprob_difference']:.2g}, same greedy text: "
        f"{'yes' if verify['greedy_equal'] else 'no'}, cached values {verify['cached_values']:g}, KL to the "
        f"original on the stored tokens {verify['kl_to_original']:.4g}."
    )


def _list(title: str, lines: Sequence[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) if lines else ""
