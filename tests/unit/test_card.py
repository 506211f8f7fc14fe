"""The model card: everything that a reader needs is on it, and what is unknown is left out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from care_mla.configs import ConvertConfig
from care_mla.export.card import Card, card_text, write_card
from care_mla.recipe import recipe_text

RECIPE = recipe_text(ConvertConfig(model="owner/small", output=Path("small-mla"), budget=0.25, seed=7))
VERIFY = {
    "engine": "transformers",
    "relative_error": 1.23e-6,
    "max_abs_logprob_difference": 4.5e-5,
    "greedy_equal": True,
    "cached_values": 96,
    "kl_to_original": 0.125,
    "passed": True,
    "problems": [],
}
CARD = Card(
    name="small-mla",
    original="owner/small",
    base_model="owner/small",
    license="apache-2.0",
    profile="deepseek-v3",
    form="decoupled",
    method="fisher",
    kv_lora_rank=64,
    qk_rope_head_dim=32,
    cached_values=(384, 96),
    kl_held_out=0.0876,
    perplexity=(12.34, 13.57),
    verify=VERIFY,
    recipe=RECIPE,
    versions={"care_mla": "0.1.0", "torch": "2.13.0", "llama.cpp": None},
    fingerprints={"source": "0123456789abcdef"},
    warnings=["512 calibration tokens are few"],
)


def front_matter(text: str) -> dict:
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert match
    return yaml.safe_load(match[1])


def test_front_matter_is_what_the_hub_reads() -> None:
    head = front_matter(card_text(CARD))
    assert head["base_model"] == "owner/small"
    assert head["license"] == "apache-2.0"
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "text-generation"
    assert "mla" in head["tags"]


def test_what_is_unknown_is_left_out() -> None:
    text = card_text(
        replace(
            CARD, base_model=None, license=None, verify=None, warnings=(), kl_held_out=None, perplexity=None
        )
    )
    head = front_matter(text)
    assert "base_model" not in head
    assert "license" not in head
    for word in ("None", "Warnings", "huggingface.co", "perplexity", "KL to"):
        assert word not in text
    assert "care verify FOLDER" in text


def test_loading_lines_run_the_profile() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", card_text(CARD), re.DOTALL)
    compile(code, "card", "exec")
    assert len(code.splitlines()) == 3
    assert "trust_remote_code" not in card_text(CARD)
    own = card_text(replace(CARD, profile="care", form="exact-rope", qk_rope_head_dim=0))
    assert 'from_pretrained("small-mla", trust_remote_code=True)' in own
    assert "RoPE key" not in own


@pytest.mark.parametrize(
    "words",
    [
        "a latent of 64 values per token and a RoPE key of 32, 25% of what the original caches",
        "| cached values per token and layer | 384 | 96 |",
        "| perplexity, held-out calibration text | 12.34 | 13.57 |",
        "| KL to the original on it, nats per token | 0 | 0.0876 |",
        "Relative error of logits 1.2e-06",
        "same greedy text: yes",
        "KL to the original on the stored tokens 0.125",
        "- torch 2.13.0",
        "- llama.cpp not installed",
        "- source: `0123456789abcdef`",
        "- 512 calibration tokens are few",
    ],
)
def test_figures_are_on_the_card(words: str) -> None:
    assert words in card_text(CARD)


def test_recipe_on_the_card_is_the_recipe() -> None:
    (recipe,) = re.findall(r"```yaml\n(.*?)```", card_text(CARD), re.DOTALL)
    assert yaml.safe_load(recipe) == yaml.safe_load(RECIPE)
    assert yaml.safe_load(recipe)["seed"] == 7


def test_failed_verification_is_said_and_why() -> None:
    failed = VERIFY | {"passed": False, "greedy_equal": False, "problems": ["relative error 0.3"]}
    text = card_text(replace(CARD, verify=failed))
    assert "**failed** (relative error 0.3)" in text
    assert "same greedy text: no" in text


def test_ranks_per_layer_are_a_range(tmp_path) -> None:
    write_card(tmp_path, replace(CARD, kv_lora_rank=[40, 72, 64]))
    assert "a latent of 40 to 72, by layer values" in (tmp_path / "README.md").read_text()
