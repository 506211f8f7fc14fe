"""The model card of a converted model: what it is, how to load it, what was measured, how to redo it.

A function of its arguments alone. Writes `README.md`, and what it was made from beside the reference, so that
`care export` can write it again for another profile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from care_mla.configs import Form, Profile
from care_mla.export_config import ExportProfile
from care_mla.workspace import read_json, write_json, write_text

CARD = Path("care_reference") / "card.json"
# What stock transformers loads a profile as; the profile `care` brings its own class.
STOCK_CLASSES: dict[Profile | ExportProfile, str] = {
    "deepseek-v3": "DeepseekV3ForCausalLM",
    "deepseek-v2": "DeepseekV2ForCausalLM",
    "mistral4": "Mistral4ForCausalLM",
    "vllm": "DeepseekV3ForCausalLM",
}
NEEDS_HEALING = "needs healing"
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
        needs_healing: what the conversion approximates besides its form and rank.
        perplexity: on the same text, of the original and of the converted model.
        rope_kl: the same KL of the best conversion with the source's RoPE table (`scaled`), and with plain
            RoPE's (`plain`), where there was a choice.
        bias_kl: the same KL with biases as they are (`keep`), and absorbed into weights (`absorb`).
        engines: True for those that run it exactly, else why not.
        verify: what `care verify` found, if it ran.
        recipe: from `recipe_text`.
        versions: of the software that decides the numbers.
        fingerprints: of what the result depends on, such as the source's weights and the calibration text.
        warnings: what the run warned about.
        matched: what block matching did, in a sentence; empty without.
        healed: what training after the conversion did, in a sentence or two; empty without.
    """

    name: str
    original: str
    base_model: str | None = None
    license: str | None = None
    profile: Profile | ExportProfile
    form: Form
    method: str
    kv_lora_rank: int | Sequence[int]
    qk_rope_head_dim: int
    cached_values: tuple[float, float]
    kl_held_out: float | None = None
    needs_healing: Sequence[str] = field(default_factory=tuple)
    perplexity: tuple[float, float] | None = None
    rope_kl: Mapping[str, float] | None = None
    bias_kl: Mapping[str, float] | None = None
    engines: Mapping[str, bool | str] = field(default_factory=dict)
    verify: Mapping[str, Any] | None = None
    recipe: str
    versions: Mapping[str, str | None]
    fingerprints: Mapping[str, str]
    warnings: Sequence[str] = field(default_factory=tuple)
    matched: str = ""
    healed: str = ""


def write_card(folder: Path, card: Card) -> None:
    """Write `README.md` and its source into a folder."""
    write_text(folder / "README.md", card_text(card))
    write_json(folder / CARD, asdict(card))


def rewrite_card(
    converted: Path, folder: Path, name: str, profile: ExportProfile, exported: Mapping[str, Any]
) -> None:
    """Write the card of a converted folder again for what was exported from it, if it has one.

    Args:
        exported: what the writer decided; the sizes in it replace those of the card.
    """
    if (converted / CARD).is_file():
        card = replace(Card(**read_json(converted / CARD)), name=name, profile=profile, verify=None)
        sizes = {key: exported[key] for key in ("kv_lora_rank", "qk_rope_head_dim") if key in exported}
        if "cached_values" in exported:
            sizes["cached_values"] = (card.cached_values[0], exported["cached_values"])
        engines = exported.get("engines", card.engines)
        write_card(folder, replace(card, engines=engines, **sizes))


def card_text(card: Card) -> str:
    """The whole card as Markdown with YAML front matter."""
    parts = [
        _front_matter(card),
        f"# {card.name}",
        _summary(card),
        _healing(card),
        _loading(card),
        _figures(card),
        _list(
            "Engines",
            [f"{name}: {'yes' if said is True else f'no, {said}'}" for name, said in card.engines.items()],
        ),
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
        f"{card.form}, method {card.method}. "
        + (f"{card.matched} " if card.matched else "")
        + (card.healed or "All other weights are the original's.")
    )


def healing_warning(reasons: Sequence[str], kl_held_out: float | None) -> str:
    """What to tell about a conversion that is approximate: why, how far off it is, and what to do."""
    assert kl_held_out is not None, "measured wherever something needs healing"
    return (
        f"{NEEDS_HEALING}: {'; '.join(reasons)}. KL to the original on held-out text is {kl_held_out:.4g} "
        "nats per token. Distil from the original before use, or convert with --form exact-rope, which is "
        "exact but for its rank"
    )


def _healing(card: Card) -> str:
    if not card.needs_healing:
        return ""
    warning = healing_warning(card.needs_healing, card.kl_held_out)
    return f"**This model {warning}.**"


def _loading(card: Card) -> str:
    is_stock = card.profile in STOCK_CLASSES
    option = "" if is_stock else ", trust_remote_code=True"
    how = (
        f"Stock transformers (5.15 or later) runs it as `{STOCK_CLASSES[card.profile]}`:"
        if is_stock
        else "It runs in transformers (5.15 or later) by the code in this folder, `modeling.py`, "
        "`latent_attention.py` and `configuration.py`, which `trust_remote_code` allows:"
    )
    # The automatic class does not know Mistral 4.
    loader = STOCK_CLASSES["mistral4"] if card.profile == "mistral4" else "AutoModelForCausalLM"
    imported = ", ".join(sorted((loader, "AutoTokenizer")))
    return (
        f"{how}\n\n```python\nfrom transformers import {imported}\n"
        f'model = {loader}.from_pretrained("{card.name}"{option})\n'
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
