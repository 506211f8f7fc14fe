"""Recipes: the options of a run as a YAML file, written beside the result and read by --recipe."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from care_mla.configs import CommonConfig
from care_mla.errors import OptionError

# These say how a run talks or where it may write, not what it computes.
_NOT_IN_A_RECIPE = ("quiet", "json", "recipe", "overwrite")


def recipe_text(config: CommonConfig) -> str:
    """The options of a config as YAML; those that are None are left out."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _NOT_IN_A_RECIPE}
    plain = {name.replace("_", "-"): _plain(value) for name, value in values.items() if value is not None}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def read_recipe(path: Path) -> dict[str, Any]:
    """The options in a recipe, under their fields' names.

    Raises:
        OptionError: there is no such file, or it holds no options.
    """
    if not path.is_file():
        raise OptionError(f"--recipe {path}: there is no such file. Check the path.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(
            f"--recipe {path} is not YAML: {error}. Write one 'option: value' per line."
        ) from error
    if not isinstance(recipe, dict):
        raise OptionError(f"--recipe {path} holds no options. Write one 'option: value' per line.")
    return {str(name).replace("-", "_"): value for name, value in recipe.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
