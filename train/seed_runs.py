"""The same training several times, with one seed after another."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mio_export.errors import UsageError
from mio_export.train.recipe import Recipe
from mio_export.train.run_files import RECIPE
from mio_export.train.training import TrainResult, train


def train_seeds(
    recipe: Recipe, data: str | Path, out: str | Path, *, num_seeds: int = 1, resume: bool = False, **how: Any
) -> list[TrainResult]:
    """Train ``num_seeds`` runs, ``out/seed-0`` and on, counted from the recipe's seed; one run is ``out`` itself.

    Args:
        recipe: the settings of all.
        data: as for ``train``.
        out: where to write.
        num_seeds: how many.
        resume: go on where it stopped: finished runs stay, a begun one is resumed, the others are trained.
        how: other arguments of ``train``.

    Raises:
        UsageError: as for ``train``, or ``num_seeds`` is below 1, or above 1 on several devices.
    """
    if num_seeds < 1:
        raise UsageError(f"seeds must be 1 or more, got {num_seeds}")
    if num_seeds == 1:
        return [train(recipe, data, out, resume=resume, **how)]
    if how.get("num_devices", 1) * how.get("num_nodes", 1) > 1:
        raise UsageError(
            "seeds train one after another in one process; on several devices, train them one by one: --seed"
        )
    runs = {seed: Path(out) / f"seed-{seed}" for seed in range(recipe.seed, recipe.seed + num_seeds)}
    return [
        train(replace(recipe, seed=seed), data, run, resume=resume and (run / RECIPE).exists(), **how)
        for seed, run in runs.items()
    ]
