"""Options: what is refused, by which message, and what a recipe keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from care_mla.configs import (
    METHODS,
    CompareConfig,
    ConvertConfig,
    PlanConfig,
    VerifyConfig,
)
from care_mla.errors import CareError, OptionError
from care_mla.evaluate_config import EvaluateConfig
from care_mla.recipe import read_recipe, recipe_text


def convert(**options: Any) -> ConvertConfig:
    return ConvertConfig(model="demo", output=Path("out"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, "--budget 0.0"),
        ({"budget": 1.5}, "--budget 1.5"),
        ({"budget": float("nan")}, "--budget nan"),
        ({"budget": 0.5, "kv_lora_rank": 64}, "--kv-lora-rank 64 both"),
        ({"kv_lora_rank": 0, "qk_rope_head_dim": 16}, "--kv-lora-rank 0"),
        ({"kv_lora_rank": 64}, "Add --qk-rope-head-dim"),
        ({"qk_rope_head_dim": 15}, "--qk-rope-head-dim 15 is odd"),
        ({"qk_rope_head_dim": 16, "form": "exact-rope"}, "no effect with --form exact-rope"),
        ({"calibration_tokens": 0}, "--calibration-tokens 0"),
        ({"sequence_length": 1}, "--sequence-length 1"),
        ({"calibration_tokens": 100, "sequence_length": 200}, "does not fill one sequence"),
        ({"calibration": ""}, "--calibration"),
        ({"damping": -0.1}, "--damping -0.1"),
        ({"damping": float("nan")}, "--damping nan"),
        ({"max_spool_gib": 0.0}, "--max-spool-gib 0.0"),
        ({"seed": -1}, "--seed -1"),
        ({"device": "gpu"}, "--device 'gpu'"),
        ({"device": "cuda:x"}, "--device 'cuda:x'"),
        ({"form": "mla"}, "--form 'mla'"),
        ({"method": "magic"}, "Methods in --form decoupled: fisher"),
        ({"method": "svd"}, "It runs with --form exact-rope"),
        ({"form": "partial-rope"}, "mha2mla-joint, mha2mla-split"),
        ({"allocation": "random"}, "--allocation 'random'"),
        ({"method": "care-e", "allocation": "greedy"}, "defined by its allocation care-eq1"),
        ({"profile": "onnx"}, "--profile 'onnx'"),
        ({"profile": "deepseek-v3", "form": "exact-rope"}, "cannot express --form exact-rope"),
        ({"profile": "deepseek-v3", "allocation": "greedy"}, "ranks per layer of allocation greedy"),
        ({"profile": "deepseek-v3", "method": "care-e"}, "ranks per layer of allocation care-eq1"),
        ({"dtype": "float8"}, "--dtype 'float8'"),
    ],
)
def test_refused_with_a_message_that_names_the_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as error:
        convert(**options)
    assert message in str(error.value)
    assert isinstance(error.value, CareError)


def test_default_budget_is_a_half_unless_the_rank_is_given() -> None:
    assert convert().budget == 0.5
    assert convert(kv_lora_rank=128, qk_rope_head_dim=64).budget is None
    assert CompareConfig(model="demo").budget == 0.5


@pytest.mark.parametrize(("form", "method"), [(f, m) for f, methods in METHODS.items() for m in methods])
def test_every_method_of_every_form_is_accepted(form: Any, method: str) -> None:
    assert PlanConfig(model="demo", form=form, method=method).method == method


def test_compare_runs_every_method_in_every_form_that_defines_it() -> None:
    assert len(CompareConfig(model="demo").method_forms()) == sum(map(len, METHODS.values()))
    config = CompareConfig(model="demo", methods="care-u, svd,care-u")
    assert config.method_forms() == [
        ("care-u", "decoupled"),
        ("care-u", "exact-rope"),
        ("svd", "exact-rope"),
    ]
    one_form = CompareConfig(model="demo", methods="care-u", form="decoupled")
    assert one_form.method_forms() == [("care-u", "decoupled")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "svd,magic"}, "'magic'"),
        ({"methods": "svd", "form": "decoupled"}, "It runs with --form exact-rope"),
        ({"methods": " , "}, "names nothing"),
        ({"block": 1}, "--block 1"),
        ({"max_tokens": 0}, "--max-tokens 0"),
    ],
)
def test_compare_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CompareConfig(model="demo", **options)


def test_evaluate_refuses_texts_whose_results_would_share_a_name() -> None:
    with pytest.raises(OptionError, match="same name"):
        EvaluateConfig(models=("a",), perplexity=(Path("x/wiki.txt"), Path("y/wiki.raw")))
    with pytest.raises(OptionError, match="MODEL"):
        EvaluateConfig(models=())


def test_paths_are_checked_before_any_work(tmp_path: Path) -> None:
    output = tmp_path / "out"
    config = ConvertConfig(model="demo", output=output)
    config.check_paths()
    output.mkdir()
    with pytest.raises(OptionError, match="--overwrite"):
        config.check_paths()
    ConvertConfig(model="demo", output=output, overwrite=True).check_paths()
    with pytest.raises(OptionError, match="this is a folder"):
        ConvertConfig(model="demo", output=tmp_path / "new", json=tmp_path).check_paths()
    with pytest.raises(OptionError, match="no such file"):
        ConvertConfig(model="demo", output=tmp_path / "new", calibration="missing.txt").check_paths()
    with pytest.raises(OptionError, match="no such file"):
        EvaluateConfig(models=("demo",), perplexity=(tmp_path / "missing.txt",)).check_paths()
    with pytest.raises(OptionError, match="care convert"):
        VerifyConfig(model=tmp_path / "missing").check_paths()


def test_recipe_gives_the_same_options_back(tmp_path: Path) -> None:
    config = convert(kv_lora_rank=96, qk_rope_head_dim=32, work=Path("w"), seed=7, overwrite=True)
    text = recipe_text(config)
    assert "overwrite" not in yaml.safe_load(text)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    options = read_recipe(path)
    paths = {name: Path(options.pop(name)) for name in ("output", "work")}
    assert ConvertConfig(**options, **paths, overwrite=True) == config


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n- b\n", "holds no options"), ("a: [", "is not YAML"), ("", "holds no")]
)
def test_recipe_that_is_none_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(OptionError, match=message):
        read_recipe(path)
    with pytest.raises(OptionError, match="no such file"):
        read_recipe(tmp_path / "missing.yaml")
