"""Training and evaluation."""

from mio_export.train.evaluation import Evaluation, evaluate
from mio_export.train.recipe import Recipe, recipe_from_dict
from mio_export.train.training import TrainResult, stored_recipe, train

__all__ = ["Evaluation", "Recipe", "TrainResult", "evaluate", "recipe_from_dict", "stored_recipe", "train"]
