"""Training and evaluation."""

from mio_export.train.evaluation import evaluate
from mio_export.train.online import online_scores
from mio_export.train.recipe import Recipe, recipe_from_dict
from mio_export.train.scores import Evaluation
from mio_export.train.seeds import SeedSummary, evaluate_seeds, seed_runs
from mio_export.train.training import TrainResult, stored_recipe, train

__all__ = [
    "Evaluation",
    "Recipe",
    "SeedSummary",
    "TrainResult",
    "evaluate",
    "evaluate_seeds",
    "online_scores",
    "recipe_from_dict",
    "seed_runs",
    "stored_recipe",
    "train",
]
