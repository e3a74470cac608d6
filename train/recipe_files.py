"""Recipes as short YAML files: those in the package by name, and your own by path."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from mio_export.errors import UsageError, one_line
from mio_export.settings import did_you_mean, with_settings
from mio_export.train.identity import stored_recipe
from mio_export.train.recipe import Recipe, recipe_from_dict

_BUILT_IN = files("mio_export.train") / "recipes"
_DEEPEST = 8


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(path.name.removesuffix(".yaml") for path in _BUILT_IN.iterdir() if path.name.endswith(".yaml"))


def resolve_recipe(
    name: str | None, given: Mapping[str, Any], settings: Sequence[str] = (), *, stored_in: Path | None = None
) -> Recipe:
    """Return the recipe that a command line means.

    Args:
        name: a recipe's name or file; None for ``folder``.
        given: settings over it; None leaves a setting as it is.
        settings: ``key=value`` over all.
        stored_in: a run whose stored recipe stands below ``given`` if no name is.

    Raises:
        UsageError: there is no such recipe or run, or a setting is not allowed.
    """
    values = stored_recipe(stored_in) if stored_in is not None and name is None else read_recipe(name or "folder")
    values |= {key: value for key, value in given.items() if value is not None}
    return recipe_from_dict(with_settings(values, settings))


def read_recipe(name: str) -> dict[str, Any]:
    """Return the settings of a recipe file, those of the file that it ``extends`` beneath them.

    Args:
        name: a name from ``recipe_names``, or the path of a ``.yaml`` file.

    Raises:
        UsageError: there is no such recipe, or the file is not a mapping in YAML.
    """
    return _read(name, _DEEPEST)


def _read(name: str, depth: int) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(_text(name))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {name} is not YAML: {one_line(error, 200)}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"recipe {name} must hold settings, such as: objective: minc")
    below = values.pop("extends", None)
    if below is None:
        return values
    if depth == 0:
        raise UsageError(f"recipe {name} extends others in a circle, or more than {_DEEPEST} deep")
    beside = Path(name).with_name(str(below))
    return _read(str(beside) if beside.suffix == ".yaml" else str(below), depth - 1) | values


def _text(name: str) -> str:
    if name in recipe_names():
        return (_BUILT_IN / f"{name}.yaml").read_text(encoding="utf-8")
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        names = recipe_names()
        raise UsageError(f"no recipe {name!r}{did_you_mean(name, names)} (a .yaml file, or one of: {', '.join(names)})")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"recipe {name} cannot be read: {error.strerror}") from None
