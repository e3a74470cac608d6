"""What a training run leaves behind: a line of metrics for each epoch, the encoder, checkpoints."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from mio_export.bundle import Training, TrainingData
from mio_export.console.progress import Progress, Task
from mio_export.errors import GateError, MioError
from mio_export.files import write_text
from mio_export.models import save_encoder
from mio_export.models.checkpoint import save_head
from mio_export.train.checkpoints import Checkpoints
from mio_export.train.data import ImageSet
from mio_export.train.loader import EpochBatches
from mio_export.train.module import SelfSupervised
from mio_export.train.objectives.registry import monitored_quantities
from mio_export.train.online_evaluation import online_scores
from mio_export.train.run_files import METRICS
from mio_export.train.watchdog import Watchdog

_CHECKED_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What is recorded, and how often; nothing of it changes the weights."""

    run: Path
    checkpoint_steps: int
    """A checkpoint is written after so many steps, besides the one after each epoch."""
    evaluate_every: int
    """Epochs between online evaluations; 0 for none."""
    on_collapse: Literal["warn", "stop"]


class Recorder(pl.Callback):
    """After each epoch: a line of metrics, then the encoder and a checkpoint, each file whole or not at all.

    Args:
        recording: what is recorded.
        images: the training images.
        data: what the encoder is trained on, for its description.
        batches: the order of the images, to name a batch.
        watchdog: looks after each epoch.
        progress: is told of alarms.
        task: is told of every step.
    """

    def __init__(
        self,
        recording: Recording,
        images: ImageSet,
        *,
        data: TrainingData,
        batches: EpochBatches,
        watchdog: Watchdog,
        progress: Progress,
        task: Task,
    ) -> None:
        self._recording, self._images, self._data, self._batches = recording, images, data, batches
        self._watchdog, self._progress, self._task = watchdog, progress, task
        self._checkpoints = Checkpoints(recording.run)
        self._losses: list[Tensor] = []
        self._num_checked = 0
        self._position = (0, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: the losses of the epoch so far, where to go on, the watchdog's yardstick."""
        losses = torch.stack(self._losses).float().cpu() if self._losses else torch.empty(0)
        epoch, batch = self._position
        return {"losses": losses, "epoch": epoch, "batch": batch, "watchdog": self._watchdog.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self._losses = list(state_dict["losses"].unbind())
        self._num_checked = len(self._losses)
        self._position = (state_dict["epoch"], state_dict["batch"])
        self._watchdog.load(state_dict["watchdog"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the metrics of the epochs that the checkpoint has seen."""
        assert isinstance(pl_module, SelfSupervised)  # the only module that this callback serves
        epoch, batch = self._position
        self._task.advance(epoch * len(self._batches) + batch)
        self._watchdog.start(pl_module)
        if trainer.is_global_zero:
            path = self._recording.run / METRICS
            lines = path.read_text().splitlines()[:epoch] if path.exists() else []
            write_text(path, "".join(f"{line}\n" for line in lines))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect the loss, see that it is finite, and now and then write a checkpoint."""
        self._losses.append(outputs["loss"].detach().float() * trainer.accumulate_grad_batches)
        self._task.advance()
        if pl_module.device.type == "cpu" or len(self._losses) % _CHECKED_EVERY == 0:
            self._check_losses(trainer)
        is_due = trainer.global_step % self._recording.checkpoint_steps == 0
        has_stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if is_due and has_stepped and batch_idx + 1 < len(self._batches):
            self._check_losses(trainer)
            self._position = (trainer.current_epoch, batch_idx + 1)
            self._join_losses(trainer)
            self._checkpoints.save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, write, save."""
        assert isinstance(pl_module, SelfSupervised)  # the only module that this callback serves
        self._check_losses(trainer)
        metrics = self._metrics(trainer, pl_module)
        self._losses, self._num_checked = [], 0
        self._position = (trainer.current_epoch + 1, 0)
        if trainer.is_global_zero:
            self._write(pl_module, metrics)
        self._checkpoints.save(trainer)
        self._report(metrics)

    def _metrics(self, trainer: pl.Trainer, module: SelfSupervised) -> dict[str, Any]:
        """A line of ``metrics.jsonl``."""
        self._join_losses(trainer)
        loss = float(torch.stack(self._losses).double().mean())
        found = self._watchdog.look(module)
        epoch, every = trainer.current_epoch + 1, self._recording.evaluate_every
        scores = {}
        if every and epoch % every == 0 and trainer.is_global_zero:
            scores = online_scores(module.online.encoder, self._images)
        return {
            "epoch": epoch,
            "step": trainer.global_step,
            "loss": loss,
            "mutual_information": module.objective.mutual_information(loss, num_images=self._batches.batch_size),
            **asdict(found.health),
            **dict.fromkeys(monitored_quantities()),
            **found.measures,
            **scores,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "alarm": found.alarm,
            "guard": found.guard,
        }

    def _write(self, module: SelfSupervised, metrics: dict[str, Any]) -> None:
        with (self._recording.run / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        information = metrics["mutual_information"]
        shown = "" if information is None else f"MI {information:.2f}, "
        self._task.advance(0, note=f"loss {metrics['loss']:.3f}, {shown}rank {metrics['effective_rank']:.0f}")
        training = Training(recipe=module.recipe.to_dict(), data=self._data, last=metrics)
        head = save_head(self._recording.run, module.online.head, module.projector_spec)
        save_encoder(self._recording.run, module.online.encoder, training=training, head=head)

    def _report(self, metrics: dict[str, Any]) -> None:
        """Say what the watchdog found, and stop if that was asked for."""
        for found in (metrics["guard"], metrics["alarm"]):
            if found is not None:
                self._progress.line(f"epoch {metrics['epoch']}: {found}")
        if metrics["alarm"] is not None and self._recording.on_collapse == "stop":
            raise GateError(f"stopped in epoch {metrics['epoch']}: {metrics['alarm']}")

    def _join_losses(self, trainer: pl.Trainer) -> None:
        """Replace each process's share of the losses by their mean, which is the joined batch's loss."""
        if trainer.world_size > 1 and self._losses:
            joined: Tensor = trainer.strategy.reduce(torch.stack(self._losses), reduce_op="mean")
            self._losses = list(joined.unbind())

    def _check_losses(self, trainer: pl.Trainer) -> None:
        """Stop at the first loss that is not finite, and name its batch."""
        unchecked = self._losses[self._num_checked :]
        finite = torch.stack(unchecked).isfinite().tolist() if unchecked else []
        if all(finite):
            self._num_checked = len(self._losses)
            return
        number = self._num_checked + finite.index(False)
        rows = self._batches.batch(trainer.current_epoch, number)
        named = ", ".join(self._images.keys[row] for row in rows[:3])
        raise MioError(
            f"the loss is not finite in epoch {trainer.current_epoch + 1}, batch {number + 1} ({named} and"
            f" {len(rows) - 3:,} others); lower learning_rate or use fp32; what earlier epochs made is in"
            f" {self._recording.run}"
        )
