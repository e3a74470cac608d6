"""What a run is: its settled recipe and its data, written down before the first step and asked for on resuming."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mio_export.bundle import TrainingData
from mio_export.errors import GateError, UsageError
from mio_export.schema import read_values, write_json
from mio_export.train.recipe import Recipe
from mio_export.train.run_files import RECIPE

_SCHEMA_VERSION = 1
"""Of ``recipe.json``; one of before there was a version is of version 1."""


def run_id(recipe: Recipe, data: TrainingData) -> str:
    """Return the sha256 of the resolved recipe and the data."""
    text = json.dumps({"recipe": recipe.to_dict(), "data": data.sha256}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_identity(run: Path, recipe: Recipe, data: TrainingData) -> None:
    """Write ``recipe.json``."""
    values = {
        "schema_version": _SCHEMA_VERSION,
        "run_id": run_id(recipe, data),
        "recipe": recipe.to_dict(),
        "data": asdict(data),
    }
    write_json(run / RECIPE, values)


def stored_recipe(run: Path) -> dict[str, Any]:
    """Return the settings of a run, as JSON-ready values.

    Raises:
        UsageError: there is no run, or its ``recipe.json`` is damaged.
    """
    recipe: dict[str, Any] = _stored(run)["recipe"]
    return recipe


def check_new(run: Path) -> None:
    """Refuse to write over a run.

    Raises:
        UsageError: there is one.
    """
    if (run / RECIPE).exists():
        raise UsageError(f"{run} holds a run already; go on with it: --resume, or choose another -o")


def check_recipe(run: Path, recipe: Recipe) -> None:
    """Refuse to go on with a run under other settings.

    Raises:
        UsageError: they differ; the message says in what.
    """
    changed = differences(stored_recipe(run), recipe.to_dict())
    if changed:
        raise UsageError(
            f"{run} is a run of another recipe ({'; '.join(changed)}); give the same settings or choose another -o"
        )


def check_data(run: Path, data: TrainingData) -> None:
    """Refuse to go on with a run on other images.

    Raises:
        UsageError: they differ.
    """
    stored = _stored(run)["data"]
    if stored["sha256"] != data.sha256:
        raise UsageError(
            f"{run} was started on other images ({stored['num_images']:,} then, {data.num_images:,} now; files"
            " were added, removed or changed); choose another -o"
        )


def differences(stored: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return a line for each setting that is not the same, those inside others by their full name."""
    lines = []
    for key in sorted(stored.keys() | given.keys()):
        before, now = stored.get(key), given.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            lines += differences(before, now, f"{prefix}{key}.")
        elif before != now:
            lines.append(f"{prefix}{key}: {before} there, {now} now")
    return lines


def _stored(run: Path) -> dict[str, Any]:
    try:
        return read_values(run / RECIPE, newest=_SCHEMA_VERSION)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{run} holds no run to resume") from None
    except GateError:
        raise UsageError(f"{run / RECIPE} is damaged; choose another -o") from None
