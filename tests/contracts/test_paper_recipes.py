"""Recipes of the paper's one-shot tables: from published sizes they give the paper's ranks, and fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from care_mla.budget import cached_values
from care_mla.cli import plan as plan_command
from care_mla.cli.options import parse
from care_mla.configs import SEPARATE_METHODS, CompareConfig, ConvertConfig, PlanConfig
from care_mla.errors import OptionError
from care_mla.facts import ModelFacts
from care_mla.families import facts_from_config
from care_mla.plan import GIB, plan
from published import LLAMA_8B, LLAMA_70B, QWEN3_4B, QWEN3_30B, QWEN25_1B

ROOT = Path(__file__).parents[2]
# The ranks of the paper's tables, each for keys and for values.
RANKS = {
    "llama-3.1-8b": (LLAMA_8B, (64, 128, 256, 512)),
    "llama-3.1-70b": (LLAMA_70B, (128, 256)),
    "qwen3-4b": (QWEN3_4B, (64, 128, 256, 512)),
    "qwen3-30b-a3b": (QWEN3_30B, (128, 256)),
    "qwen2.5-1.5b": (QWEN25_1B, (64, 96, 128)),
}
RECIPES = [(model, rank) for model, (_, ranks) in RANKS.items() for rank in ranks]
# WikiText-2's raw test set has so many tokens at most, whatever the tokenizer.
TEST_SET = 300_000


def recipe(model: str, name: str) -> Path:
    return ROOT / "recipes" / model / f"{name}.yaml"


def dry_run(facts: ModelFacts, config: CompareConfig, method: str, form: Any) -> int:
    """Cached values of a row as `care plan` counts them."""
    options = {
        name: getattr(config, name)
        for name in ("model", "budget", "calibration", "calibration_tokens", "sequence_length", "damping")
    }
    found = plan(facts, PlanConfig(form=form, method=method, **options), device="cuda")
    assert found.calibration_tokens == 256 * 32
    assert {cached_values(facts, form, dims) for dims in found.candidates} == {
        found.cached_values["converted"]
    }
    return found.cached_values["converted"]


def test_there_is_a_recipe_for_every_rank_and_no_other() -> None:
    found = {(path.parent.name, path.stem) for path in ROOT.glob("recipes/*/one-shot-r*.yaml")}
    assert found == {(model, f"one-shot-r{rank}") for model, rank in RECIPES}


@pytest.mark.parametrize(("model", "rank"), RECIPES)
def test_every_row_caches_what_the_paper_caches(model: str, rank: int) -> None:
    facts = facts_from_config(RANKS[model][0])
    config = parse(CompareConfig, "compare", ["--recipe", str(recipe(model, f"one-shot-r{rank}"))])
    methods = config.method_forms()
    assert {"svd", "care-u", "care-e", "fisher"} <= {method for method, _ in methods}
    assert any(method in SEPARATE_METHODS[form] for method, form in methods)
    assert {dry_run(facts, config, *method) for method in methods} == {2 * rank}
    assert {dry_run(facts, config, method, "decoupled") for method in ("transmla", "care-u")} == {2 * rank}
    if 2 * rank == 16 * facts.num_key_value_heads:
        with pytest.raises(OptionError, match="too few for a latent"):
            dry_run(facts, config, "mha2mla-joint", "partial-rope")
    else:
        assert dry_run(facts, config, "mha2mla-joint", "partial-rope") == 2 * rank
    states = 4 * TEST_SET * facts.hidden_size * (len(methods) + 1)
    assert states < 0.8 * 80e9


@pytest.mark.parametrize("model", RANKS)
def test_care_plan_dry_runs_the_conversion(model: str, tmp_path: Path) -> None:
    published, ranks = RANKS[model]
    (tmp_path / "config.json").write_text(json.dumps(published))
    result = tmp_path / "plan.json"
    path = str(recipe(model, "one-shot-convert"))
    convert = parse(ConvertConfig, "convert", [str(tmp_path), str(tmp_path / "OUT"), "--recipe", path])
    assert convert.budget == 2 * ranks[-1] / facts_from_config(published).cached_values
    words = [str(tmp_path), "--recipe", path, "--method", "care-e", "--device", "cpu", "--quiet"]
    assert plan_command.run([*words, "--json", str(result)]) == 0
    found = json.loads(result.read_text())
    assert found["cached_values"]["converted"] == 2 * ranks[-1]


@pytest.mark.parametrize("model", RANKS)
def test_the_table_of_recipes_is_their_plan(model: str) -> None:
    published, ranks = RANKS[model]
    facts = facts_from_config(published)
    config = parse(CompareConfig, "compare", ["--recipe", str(recipe(model, f"one-shot-r{ranks[-1]}"))])
    options = {"calibration_tokens": config.calibration_tokens, "sequence_length": config.sequence_length}
    planned = PlanConfig(
        model="", form="exact-rope", method="care-u", calibration="alpaca", budget=0.5, **options
    )
    memory = plan(facts, planned, device="cuda").memory_bytes
    states = 4 * TEST_SET * facts.hidden_size * (len(config.method_forms()) + 1)
    row = (
        f"| `{model}` | {', '.join(map(str, ranks))} "
        f"| {', '.join(f'{2 * rank:,}' for rank in ranks)} of {facts.cached_values:,} "
        f"| {memory / GIB:.0f} GiB | {states / GIB:.0f} GiB |"
    )
    assert row in (ROOT / "recipes/README.md").read_text().splitlines(), row


def test_commands_in_the_comments_name_their_own_recipe() -> None:
    for path in ROOT.glob("recipes/*/one-shot-*.yaml"):
        (named,) = re.findall(r"--recipe (\S+)", path.read_text())
        assert ROOT / named == path
