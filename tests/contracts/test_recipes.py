"""Recipes that the project ships: they parse, mean what they say, and fit the machines that they name."""

from __future__ import annotations

from pathlib import Path

import pytest

from care_mla.cli.options import parse
from care_mla.configs import ConvertConfig
from care_mla.errors import OptionError
from care_mla.facts import ModelFacts
from care_mla.families import facts_from_config
from care_mla.heal.memory import MemoryPlan, count_parameters, memory_plan
from care_mla.heal.sizes import resolve_sizes
from care_mla.heal_config import HealConfig
from care_mla.mla.mapping import LatentDims, latent_config
from care_mla.plan import plan
from care_mla.recipe import read_recipe
from published import LLAMA_8B, QWEN25_1B

ROOT = Path(__file__).parents[2]
CONVERSIONS = sorted([*ROOT.glob("recipes/*/convert.yaml"), *ROOT.glob("benchmarks/healing/*/convert.yaml")])
HEALINGS = sorted([*ROOT.glob("recipes/*/heal*.yaml"), *ROOT.glob("benchmarks/healing/*/heal.yaml")])
PUBLISHED = {"llama-3.1-8b": LLAMA_8B, "qwen2.5-1.5b": QWEN25_1B}
# Recipe, tokens trained on, GPUs of 80 GB.
MACHINES = {
    ("llama-3.1-8b", "heal-1b"): (1e9, 8),
    ("llama-3.1-8b", "heal-3b"): (3e9, 8),
    ("qwen2.5-1.5b", "heal-1b"): (1e9, 1),
}


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", CONVERSIONS, ids=named)
def test_conversions_parse(path: Path, tmp_path: Path) -> None:
    config = parse(ConvertConfig, "convert", ["demo", str(tmp_path / "OUT"), "--recipe", str(path)])
    assert config.qk_rope_head_dim == read_recipe(path).get("qk_rope_head_dim")


@pytest.mark.parametrize("path", HEALINGS, ids=named)
def test_healings_parse(path: Path, tmp_path: Path) -> None:
    words = [str(tmp_path / "OUT"), str(tmp_path / "HEALED"), "--recipe", str(path)]
    teacher = [] if "teacher" in read_recipe(path) else ["--teacher", "demo"]
    # Every option is right, and then there is no such folder.
    with pytest.raises(OptionError, match="OUT is not a folder"):
        parse(HealConfig, "heal", words + teacher)


def planned(model: str, recipe: str, gpus: int) -> tuple[HealConfig, MemoryPlan]:
    """The memory plan of a recipe, from the published sizes of its model."""
    facts: ModelFacts = facts_from_config(PUBLISHED[model])
    folder = ROOT / "recipes" / model
    convert = ConvertConfig(output=Path("OUT"), **read_recipe(folder / "convert.yaml"))
    (dims,) = plan(facts, convert, device="cuda").candidates
    options = read_recipe(folder / f"{recipe}.yaml")
    options["data"] = tuple(options["data"])
    heal = HealConfig(model=Path("OUT"), output=Path("HEALED"), **options)
    layer = LatentDims(
        latent_form="decoupled",
        num_key_value_heads=facts.num_attention_heads,
        kv_lora_rank=dims.kv_lora_rank,
        qk_nope_head_dim=facts.head_dim,
        qk_rope_head_dim=dims.qk_rope_head_dim,
        num_rope_key_heads=1,
        q_bias=facts.q_bias,
        k_rope_bias=facts.k_bias,
    )
    student = latent_config(facts, [layer] * facts.num_hidden_layers)
    parameters = count_parameters(facts, student, facts, heal)
    sizes = resolve_sizes(facts, heal, on_gpu=True, processes=gpus)
    shards = gpus if heal.shard else 1
    return heal, memory_plan(facts, heal, sizes, parameters, on_gpu=True, shards=shards)


@pytest.mark.parametrize(("model", "recipe"), MACHINES, ids=lambda value: value)
def test_recipes_of_the_paper_fit_their_machines(model: str, recipe: str) -> None:
    tokens, gpus = MACHINES[model, recipe]
    heal, memory = planned(model, recipe, gpus)
    assert heal.steps is not None
    assert heal.batch_size is not None
    assert heal.sequence_length is not None
    assert heal.steps * heal.batch_size * heal.sequence_length == pytest.approx(tokens, rel=2e-3)
    assert 0.2 * 80e9 < memory.memory_bytes < 0.8 * 80e9
    row = f"| `{model}/{recipe}.yaml` | {tokens / 1e9:g} B | {gpus} | {memory.memory_bytes / 2**30:.0f} GiB |"
    row += f" {memory.disk_bytes / 2**30:.0f} GiB |"
    assert row in (ROOT / "recipes/README.md").read_text().splitlines(), row
