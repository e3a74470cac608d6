"""Training and evaluation."""

from mio_export.train.evaluation import evaluate
from mio_export.train.plan import Plan
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
