"""Training and evaluation; ``mio_export.train(...)`` is ``mio_export.train.train(...)``."""

import sys
from types import ModuleType
from typing import Any

from mio_export.train.cost import Plan
from mio_export.train.evaluation import evaluate
from mio_export.train.recipe import Recipe, recipe_from_dict
from mio_export.train.recipe_files import recipe_names, resolve_recipe
from mio_export.train.scores import Evaluation
from mio_export.train.seed_runs import train_seeds
from mio_export.train.seeds import SeedSummary, evaluate_seeds, seed_runs
from mio_export.train.training import TrainResult, plan_training, train

__all__ = [
    "Evaluation",
    "Plan",
    "Recipe",
    "SeedSummary",
    "TrainResult",
    "evaluate",
    "evaluate_seeds",
    "plan_training",
    "recipe_from_dict",
    "recipe_names",
    "resolve_recipe",
    "seed_runs",
    "train",
    "train_seeds",
]


class _Callable(ModuleType):
    """Python sets ``mio_export.train`` to this package when it is imported, so the package has to be the function."""

    def __call__(self, *arguments: Any, **options: Any) -> TrainResult:
        return train(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
