"""Optimisers and their schedule, from a recipe."""

from collections.abc import Sequence
from typing import Any

import torch
from lightly.models.utils import get_weight_decay_parameters
from lightly.utils.lars import LARS
from lightly.utils.scheduler import CosineWarmupScheduler
from torch import nn

from mio_export.train.recipe import Recipe


def build_optimizer(modules: Sequence[nn.Module], recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimiser over the modules' parameters.

    Batch norm (that of a ResNet's shortcuts included) and biases have no weight decay, and so, with LARS, no layer-wise
    rate: lightly's ``LARS`` leaves groups without decay alone.

    Source of LARS: You et al. 2017 (arXiv 1708.03888), with the trust coefficient 1e-3.
    """
    decayed, plain = get_weight_decay_parameters(modules)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.learning_rate)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum)
    optimizer: torch.optim.Optimizer = LARS(
        groups, lr=recipe.learning_rate, momentum=recipe.momentum, trust_coefficient=1e-3
    )
    return optimizer


def build_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, *, num_steps: int) -> Any:
    """Return the schedule of the rate, step by step: a linear rise, then a cosine.

    The cosine is laid out over ``schedule_epochs``; training that stops earlier ends at a higher rate.
    """
    total = num_steps * (recipe.schedule_epochs or recipe.epochs) // recipe.epochs
    floor = recipe.floor_learning_rate / recipe.learning_rate
    return CosineWarmupScheduler(
        optimizer,
        warmup_epochs=int(recipe.warmup_share * num_steps),
        max_epochs=total,
        end_value=floor,
        warmup_start_value=floor,
    )
