"""What a training run leaves behind after each epoch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from torch import Tensor

from mio_export.bundle import Training, TrainingData
from mio_export.errors import MioError
from mio_export.files import staged_file, write_text
from mio_export.metrics import effective_rank, spectrum
from mio_export.models import Encoder, save_encoder
from mio_export.preprocess import Pixels
from mio_export.progress import Task
from mio_export.sources import spread
from mio_export.train.module import SelfSupervised
from mio_export.train.run_report import METRICS, SPECTRUM, VIEWS, views_sheet, write_report
from mio_export.train.views import two_views

CHECKPOINT = "last.ckpt"
_SHOWN = 12
Features = npt.NDArray[np.float32]


class Recorder(pl.Callback):
    """After each epoch: a line of metrics, then the encoder and a checkpoint, each file whole or not at all.

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

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what the report shows beside the metrics, and the report."""
        assert isinstance(pl_module, SelfSupervised)  # the only module that this callback serves
        encoder, recipe = pl_module.online["encoder"], pl_module.recipe
        assert isinstance(encoder, Encoder)  # ModuleDict forgets the type
        features, projections = self._outputs(pl_module)
        untrained = encoder.untrained(seed=recipe.seed).embed(self._clean)
        outputs = {"features": features, "projections": projections, "untrained": untrained}
        spectra = {name: spectrum(rows).tolist() for name, rows in outputs.items()}
        write_text(self._run / SPECTRUM, json.dumps(spectra) + "\n")
        images = torch.from_numpy(self._clean[spread(range(len(self._clean)), _SHOWN)])
        views = two_views(images, recipe.views, torch.Generator().manual_seed(recipe.seed))
        first, second = (view.round().byte().permute(0, 2, 3, 1).numpy() for view in views)
        with staged_file(self._run / VIEWS) as temporary:
            temporary.write_bytes(views_sheet(images.numpy(), first, second))
        write_report(self._run)

    def _outputs(self, module: SelfSupervised) -> tuple[Features, Features]:
        """Features and projections of the clean images."""
        encoder, head = module.online["encoder"], module.online["head"]
        assert isinstance(encoder, Encoder)  # ModuleDict forgets the type
        features = encoder.embed(self._clean)
        head.eval()
        with torch.inference_mode():
            projections = head(torch.from_numpy(features).to(module.device)).float().cpu().numpy()
        head.train()
        return features, projections

    def _health(self, module: SelfSupervised, loss: float) -> dict[str, float | None]:
        """The mutual-information estimate, if there is one, and the ranks on clean training images."""
        features, projections = self._outputs(module)
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
        save_encoder(self._run, encoder, training=training)
        with staged_file(self._run / CHECKPOINT) as temporary:
            trainer.save_checkpoint(temporary)
