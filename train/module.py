"""The training step, as a Lightning module: two views, one objective, whatever the objective is."""

import copy
from typing import Any

import pytorch_lightning as pl
import torch
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor

from mio_export.bundle import ProjectorSpec
from mio_export.models import Encoder
from mio_export.models.projection_head import build_prediction_head, build_projector
from mio_export.train.branch import Branch
from mio_export.train.objectives.registry import OBJECTIVES, build_objective
from mio_export.train.optimizers import build_optimizer, build_schedule
from mio_export.train.recipe import Recipe
from mio_export.train.views import two_views

_SEEDS_APART = 1_000_003
_RANKS_APART = 7_919


class SelfSupervised(pl.LightningModule):
    """An encoder and a projection head under one objective.

    All randomness of a step comes from the seed and the batch's number, so that a resumed run repeats an uninterrupted
    one without any generator's state in the checkpoint.

    Args:
        encoder: what is trained.
        recipe: the settings.
        num_batches: batches of an epoch.
    """

    def __init__(self, encoder: Encoder, recipe: Recipe, *, num_batches: int) -> None:
        super().__init__()
        self.recipe = recipe
        self._num_batches = num_batches
        spec = OBJECTIVES[recipe.objective]
        objective = build_objective(recipe.objective, output_dim=recipe.output_dim, arguments=recipe.loss)
        self.projector_spec = ProjectorSpec(
            hidden_dim=recipe.hidden_dim,
            output_dim=recipe.output_dim,
            num_layers=recipe.num_layers,
            norm=recipe.head_norm,
            ordered=bool(objective.ordered),
            keep=recipe.output_dim,
        )
        self.online = Branch(encoder, build_projector(encoder.spec.embedding_dim, self.projector_spec))
        self.target: Branch | None = None
        if spec.target == "average":
            self.target = copy.deepcopy(self.online)
            deactivate_requires_grad(self.target)
        self.predictor = build_prediction_head(spec.predictor, dim=recipe.output_dim, hidden_dim=recipe.hidden_dim)
        self.stops_gradient = spec.target == "online"
        self.objective = objective
        self.to(memory_format=torch.channels_last)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """Return the loss of a batch: uint8 images, shape (N, H, W, C), and their indices, shape (N,)."""
        images, _ = batch
        generator = torch.Generator(self.device).manual_seed(self._batch_seed(batch_index))
        return self.compare(*two_views(images, self.recipe.views, generator, size=self.view_size))

    @property
    def view_size(self) -> int:
        """Side of a view in pixels; stored images may be larger."""
        return self.online.encoder.preprocess.image_size

    def compare(self, view_0: Tensor, view_1: Tensor) -> Tensor:
        """Return the loss of two views of each image, shape (N, C, H, W), float pixels in [0, 255]."""
        views = torch.cat([view_0, view_1]).contiguous(memory_format=torch.channels_last)
        projections = self.online(views)
        compared = [self.predictor(projections)]
        if self.target is not None:
            with torch.no_grad():
                compared.append(self.target(views))
        elif self.stops_gradient:
            compared.append(projections.detach())
        with torch.autocast(views.device.type, enabled=False):
            loss: Tensor = self.objective(*[half for z in compared for half in z.chunk(2)])
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed whatever a backbone draws by itself, such as dropout."""
        torch.manual_seed(self._batch_seed(batch_idx))

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        """Take a step, and move the target encoder after the online one."""
        super().optimizer_step(*arguments, **named)
        if self.target is not None:
            update_momentum(self.online, self.target, m=self.recipe.target_momentum)

    def configure_optimizers(self) -> Any:
        """Return the recipe's optimiser and its schedule over all steps."""
        optimizer = build_optimizer([self.online, self.predictor], self.recipe)
        schedule = build_schedule(optimizer, self.recipe, num_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _batch_seed(self, batch_index: int) -> int:
        number = self.current_epoch * self._num_batches + batch_index
        return self.recipe.seed * _SEEDS_APART + self.global_rank * _RANKS_APART * _SEEDS_APART + number
