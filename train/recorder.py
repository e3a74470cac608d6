"""What a training run leaves behind after each epoch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from mio_export.bundle import ProjectorSpec, Training, TrainingData
from mio_export.errors import MioError
from mio_export.files import staged_file, write_text
from mio_export.metrics import effective_rank
from mio_export.models import Encoder, save_encoder
from mio_export.models.checkpoint import save_head
from mio_export.preprocess import Pixels
from mio_export.progress import Task
from mio_export.train.module import SelfSupervised
from mio_export.train.objectives import MINCLoss

METRICS = "metrics.jsonl"
CHECKPOINT = "last.ckpt"


class Recorder(pl.Callback):
    """After each epoch: a line of metrics, then head, encoder and a checkpoint, each file whole or not at all.

    Args:
        run: the run's folder.
        clean: training images without augmentation to measure ranks on, uint8, shape (N, H, W, C).
        task: is told of every step.
        data: what the encoder is trained on, for its description.
    """

    def __init__(self, run: Path, clean: Pixels, task: Task, *, data: TrainingData) -> None:
        self._run, self._clean, self._task, self._data = run, clean, task, data
        self._losses: list[Tensor] = []
        self._num_images = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the metrics of the epochs that the checkpoint has seen."""
        path = self._run / METRICS
        lines = (
            path.read_text().splitlines()[: trainer.current_epoch] if path.exists() and trainer.current_epoch else []
        )
        write_text(path, "".join(f"{line}\n" for line in lines))
        if trainer.global_step:
            self._task.advance(trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the loss."""
        self._losses.append(outputs["loss"].detach())
        self._num_images = len(batch)
        self._task.advance()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, write, save."""
        assert isinstance(pl_module, SelfSupervised)  # the only module that this callback serves
        loss = float(torch.stack(self._losses).double().mean())
        self._losses.clear()
        if not np.isfinite(loss):
            raise MioError(
                f"the loss is not finite in epoch {trainer.current_epoch + 1}; lower learning_rate or use fp32"
                f"; what earlier epochs made is in {self._run}"
            )
        metrics = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "loss": loss,
            **self._health(pl_module, loss),
        }
        metrics["learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        with (self._run / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        information = metrics["mutual_information"]
        shown = "" if information is None else f"MI {information:.2f}, "
        self._task.advance(0, note=f"loss {loss:.3f}, {shown}rank {metrics['effective_rank']:.0f}")
        self._save(trainer, pl_module, metrics)

    def _health(self, module: SelfSupervised, loss: float) -> dict[str, float | None]:
        """The mutual-information estimate, if there is one, and the ranks on clean training images."""
        encoder, head = module.online["encoder"], module.online["head"]
        assert isinstance(encoder, Encoder)  # ModuleDict forgets the type
        features = encoder.embed(self._clean)
        head.eval()
        with torch.inference_mode():
            projections = head(torch.from_numpy(features).to(module.device)).float().cpu().numpy()
        head.train()
        estimate: Callable[..., float | None] = module.objective.mutual_information  # type: ignore[assignment]
        return {
            "mutual_information": estimate(loss, num_images=self._num_images),
            "effective_rank": effective_rank(features),
            "effective_rank_projections": effective_rank(projections),
        }

    def _save(self, trainer: pl.Trainer, module: SelfSupervised, metrics: dict[str, Any]) -> None:
        encoder = module.online["encoder"]
        assert isinstance(encoder, Encoder)  # ModuleDict forgets the type
        training = Training(recipe=module.recipe.to_dict(), data=self._data, last=metrics)
        head = save_head(self._run, module.online["head"], _projector_spec(module))
        save_encoder(self._run, encoder, training=training, head=head)
        with staged_file(self._run / CHECKPOINT) as temporary:
            trainer.save_checkpoint(temporary)


def _projector_spec(module: SelfSupervised) -> ProjectorSpec:
    recipe = module.recipe
    return ProjectorSpec(
        hidden_dim=recipe.hidden_dim,
        output_dim=recipe.output_dim,
        num_layers=recipe.num_layers,
        ordered=isinstance(module.objective, MINCLoss) and bool(module.objective.ordered),
        keep=recipe.output_dim,
    )
