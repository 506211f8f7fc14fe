"""From words on the command line and a recipe file to a config; the only module that knows tyro.

A recipe is a YAML file of options under their flags' names. It is turned into flags placed before the user's
own, so that one parser checks both, and the last one wins.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, field, fields, make_dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_origin, get_type_hints

import tyro

from care_mla import console
from care_mla.configs import CommonConfig
from care_mla.errors import OptionError
from care_mla.recipe import read_recipe

ConfigT = TypeVar("ConfigT", bound=CommonConfig)


def parse(config_class: type[ConfigT], command: str, arguments: list[str]) -> ConfigT:
    """Parse a command's words, check values and paths, and set up the console.

    Raises:
        OptionError: the recipe cannot be read, or a path is not what the option needs.
        SystemExit: with 0 after --help, with 2 after a wrong option, whose explanation is printed.
    """
    names = {f.name for f in fields(config_class)}
    recipe = _recipe_options(arguments, names) if "recipe" in names else {}
    by_place = {
        f.name: recipe.pop(f.name) for f in fields(config_class) if _is_by_place(f) and f.name in recipe
    }
    parsed = tyro.cli(
        _front(config_class, by_place),
        prog=f"care {command}",
        args=_flags(recipe) + arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    config = config_class(**{name: getattr(parsed, name) for name in names})
    console.set_quiet(config.quiet)
    config.check_paths()
    return config


def _is_by_place(f: Field[Any]) -> bool:
    """Whether a field is an argument and not a flag: it has no default, or is the folder of the demo."""
    return (f.default is MISSING and f.default_factory is MISSING) or f.name == "folder"


def _front(config_class: type[ConfigT], by_place: dict[str, Any]) -> type[ConfigT]:
    """The config class with tyro's marks; arguments that the recipe gives need not be given again."""
    hints = get_type_hints(config_class)
    marked: list[tuple[str, Any, Any]] = []
    for f in fields(config_class):
        default = field(default=f.default, default_factory=f.default_factory)  # type: ignore[call-overload]
        if _is_by_place(f):
            metavar = tyro.conf.arg(metavar=f.name.removesuffix("s").upper())
            if f.name in by_place:
                default = field(default=_argument(hints[f.name], by_place[f.name]))
            marked.append((f.name, Annotated[tyro.conf.Positional[hints[f.name]], metavar], default))
        elif get_origin(hints[f.name]) is tuple:
            marked.append((f.name, tyro.conf.UseAppendAction[hints[f.name]], default))
    front = make_dataclass(config_class.__name__, marked, bases=(config_class,), frozen=True, kw_only=True)
    front.__doc__ = config_class.__doc__
    return front


def _argument(hint: Any, value: Any) -> Any:
    if get_origin(hint) is tuple:
        return tuple(value) if isinstance(value, list) else (str(value),)
    return hint(value)


def _recipe_options(arguments: list[str], names: set[str]) -> dict[str, Any]:
    """The options in the file that --recipe names, under their fields' names; none without --recipe."""
    path = None
    for word, following in pairwise([*arguments, ""]):
        if word == "--recipe" and following:
            path = Path(following)
        elif word.startswith("--recipe="):
            path = Path(word.removeprefix("--recipe="))
    if path is None:
        return {}
    recipe = read_recipe(path)
    for name in recipe.keys() - names:
        near = [other.replace("_", "-") for other in get_close_matches(name, names, n=1)]
        raise OptionError(
            f"--recipe {path}: this command has no option {name.replace('_', '-')!r}. "
            + (f"Perhaps you meant {near[0]!r}." if near else "Remove the line; --help lists the options.")
        )
    return recipe


def _flags(recipe: dict[str, Any]) -> list[str]:
    """A recipe as words: true is the flag alone, false and null are its absence, a list repeats the flag."""
    words: list[str] = []
    for name, value in recipe.items():
        flag = f"--{name.replace('_', '-')}"
        for item in value if isinstance(value, list) else [value]:
            match item:
                case None | False:
                    continue
                case True:
                    words.append(flag)
                case _:
                    words += [flag, str(item)]
    return words
