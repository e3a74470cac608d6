"""The training step, as a Lightning module: two views, one objective, whatever the objective is."""

import copy
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.scheduler import CosineWarmupScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from mio_export.models import Encoder
from mio_export.models.projection_head import build_prediction_head, build_projection_head
from mio_export.preprocess import Pixels
from mio_export.train.objectives.registry import OBJECTIVES, build_objective
from mio_export.train.recipe import Recipe
from mio_export.train.views import two_views


class SelfSupervised(pl.LightningModule):
    """An encoder and a projection head under one objective.

    All randomness of a step comes from the seed and the step's number, so that a resumed run repeats an uninterrupted
    one without any generator's state in the checkpoint.
    """

    def __init__(self, encoder: Encoder, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        head = build_projection_head(
            encoder.spec.embedding_dim,
            hidden_dim=recipe.hidden_dim,
            output_dim=recipe.output_dim,
            num_layers=recipe.num_layers,
        )
        spec = OBJECTIVES[recipe.objective]
        self.online = nn.ModuleDict({"encoder": encoder, "head": head})
        self.target: nn.ModuleDict | None = None
        if spec.target == "average":
            self.target = copy.deepcopy(self.online)
            deactivate_requires_grad(self.target)
        self.predictor = build_prediction_head(spec.predictor, dim=recipe.output_dim, hidden_dim=recipe.hidden_dim)
        self.stops_gradient = spec.target == "online"
        self.objective = build_objective(recipe.objective, output_dim=recipe.output_dim, arguments=recipe.loss)
        self.to(memory_format=torch.channels_last)

    def training_step(self, images: Tensor, batch_index: int) -> Tensor:
        """Return the loss of a batch of uint8 images, shape (N, H, W, C)."""
        del batch_index
        generator = torch.Generator(self.device).manual_seed(self._step_seed())
        views = torch.cat(two_views(images, self.recipe.views, generator)).contiguous(memory_format=torch.channels_last)
        projections = _project(self.online, views)
        compared = [self.predictor(projections)]
        if self.target is not None:
            with torch.no_grad():
                compared.append(_project(self.target, views))
        elif self.stops_gradient:
            compared.append(projections.detach())
        with torch.autocast(self.device.type, enabled=False):
            loss: Tensor = self.objective(*[half for z in compared for half in z.float().chunk(2)])
        return loss

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Seed whatever a backbone draws by itself, such as dropout."""
        torch.manual_seed(self._step_seed())

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        """Move the target encoder after the online one."""
        if self.target is not None:
            update_momentum(self.online, self.target, m=self.recipe.target_momentum)

    def configure_optimizers(self) -> Any:
        """Return AdamW with warm-up and cosine over all steps."""
        optimizer = torch.optim.AdamW(
            [*self.online.parameters(), *self.predictor.parameters()],
            lr=self.recipe.learning_rate,
            weight_decay=self.recipe.weight_decay,
        )
        num_steps = int(self.trainer.estimated_stepping_batches)
        schedule = CosineWarmupScheduler(
            optimizer,
            warmup_epochs=int(self.recipe.warmup_share * num_steps),
            max_epochs=num_steps,
            end_value=0.0,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _step_seed(self) -> int:
        return self.recipe.seed * 1_000_003 + self.global_step


def _project(branch: nn.ModuleDict, views: Tensor) -> Tensor:
    """Return projections, shape (2N, D), of views given as float pixels in [0, 255]."""
    encoder = branch["encoder"]
    assert isinstance(encoder, Encoder)  # ModuleDict forgets the type
    projections: Tensor = branch["head"](encoder.embed_pixels(views))
    return projections


class BatchSet(Dataset[Tensor]):
    """Images in memory that are taken out a whole batch at a time."""

    def __init__(self, pixels: Pixels) -> None:
        self._pixels = torch.from_numpy(pixels)

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self._pixels[index]

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self._pixels[torch.tensor(indices)]


class EpochSampler(Sampler[int]):
    """A new order for each epoch, from the seed and the epoch's number alone."""

    def __init__(self, num_images: int, seed: int) -> None:
        self._num_images, self._seed, self._epoch = num_images, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        return iter(torch.randperm(self._num_images, generator=generator).tolist())

    def __len__(self) -> int:
        return self._num_images


def batch_loader(pixels: Pixels, *, batch_size: int, seed: int) -> DataLoader[Tensor]:
    """Return a loader of whole uint8 batches, shape (N, H, W, C), the ragged last one left out."""
    return DataLoader(
        BatchSet(pixels),
        batch_size=batch_size,
        sampler=EpochSampler(len(pixels), seed),
        drop_last=True,
        collate_fn=_as_it_is,
    )


def _as_it_is(batch: Any) -> Any:
    return batch
