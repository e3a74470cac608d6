"""``train``: from a folder of images to an encoder, with a record of how it went."""

import json
import logging
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from mio_export.errors import MioError, UsageError
from mio_export.files import staged_file, write_text
from mio_export.metrics import effective_rank
from mio_export.models import Encoder, build_encoder, save_encoder
from mio_export.preprocess import Pixels, Preprocess
from mio_export.progress import Progress, Task
from mio_export.runtimes.devices import num_threads
from mio_export.train.image_set import Geometry, ImageSet, load_images, mean_and_std, probe_geometry, split_folder
from mio_export.train.module import SelfSupervised, batch_loader
from mio_export.train.recipe import Recipe

RECIPE = "recipe.json"
METRICS = "metrics.jsonl"
CHECKPOINT = "last.ckpt"
_CLEAN_SUBSET = 512
_SMALL_IMAGE = 64


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run."""

    run: Path
    recipe: Recipe
    """With every ``auto`` settled."""
    encoder: Encoder
    metrics: dict[str, Any]
    """The last line of ``metrics.jsonl``."""
    failures: tuple[str, ...]
    """Training images that could not be read."""


def train(
    recipe: Recipe,
    data: str | Path,
    run: str | Path,
    *,
    resume: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> TrainResult:
    """Train an encoder on a folder of images.

    The run's folder holds ``recipe.json`` (every setting), ``metrics.jsonl`` (a line an epoch), ``last.ckpt`` (to
    resume from) and the encoder itself, all of it as of the last whole epoch.

    Args:
        recipe: the settings.
        data: a folder of images; class folders are not needed, and not looked at while training.
        run: where to write.
        resume: go on with the run that lies there.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: is told how far the work is.

    Raises:
        UsageError: a setting is not allowed, or there is a run already (or none to resume, or of another recipe).
        MioError: the images cannot be used, or the loss is not finite.
    """
    data, run = Path(data), Path(run)
    progress = progress or Progress()
    split = split_folder(data)
    recipe = _settled(recipe, probe_geometry(split.train))
    _check_run(run, recipe, resume)
    preprocess = _contract(recipe, (0.5,), (0.5,))
    images = load_images(split.train, split, preprocess, progress)
    preprocess = _contract(recipe, *mean_and_std(images))
    if resume:
        _check_data(run, images)
    if len(images.pixels) < 2:
        raise MioError(f"{data} holds one training image; an objective needs at least two")
    for failure in images.failures:
        progress.line(f"left out: {failure}")
    encoder = _fit(recipe, preprocess, images, run, resume, device, progress)
    last = json.loads((run / METRICS).read_text().splitlines()[-1])
    return TrainResult(run=run, recipe=recipe, encoder=encoder.eval(), metrics=last, failures=images.failures)


def _settled(recipe: Recipe, geometry: Geometry) -> Recipe:
    """Turn every ``auto`` that depends on the images into a value."""
    size = recipe.image_size or geometry.image_size
    is_small = size <= _SMALL_IMAGE
    backbone = recipe.backbone if recipe.backbone != "auto" else ("small" if is_small else "torchvision/resnet18")
    stem = (
        recipe.stem
        if recipe.stem != "auto"
        else ("small" if is_small and not backbone.startswith("timm/") else "imagenet")
    )
    channels = recipe.channels or geometry.channels
    return replace(recipe, image_size=size, channels=channels, backbone=backbone, stem=stem)


def _contract(recipe: Recipe, mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocess:
    assert recipe.image_size is not None  # settled
    assert recipe.channels is not None
    if len(mean) != recipe.channels:
        mean, std = mean * recipe.channels, std * recipe.channels
    return Preprocess(image_size=recipe.image_size, channels=recipe.channels, mean=mean, std=std)


def _check_run(run: Path, recipe: Recipe, resume: bool) -> None:
    path = run / RECIPE
    if not resume:
        if path.exists():
            raise UsageError(f"{run} holds a run already; go on with it: --resume, or choose another -o")
        run.mkdir(parents=True, exist_ok=True)
        return
    if not path.is_file():
        raise UsageError(f"{run} holds no run to resume")
    stored = json.loads(path.read_text())["recipe"]
    given = recipe.to_dict()
    changed = [f"{key}: {stored.get(key)} there, {given[key]} now" for key in given if stored.get(key) != given[key]]
    if changed:
        raise UsageError(
            f"{run} is a run of another recipe ({'; '.join(changed)}); give the same settings or choose another -o"
        )


def _check_data(run: Path, images: ImageSet) -> None:
    if json.loads((run / RECIPE).read_text())["data_sha256"] != images.sha256:
        raise UsageError(f"{run} was begun on other images (files were added, removed or changed); choose another -o")


def _fit(
    recipe: Recipe, preprocess: Preprocess, images: ImageSet, run: Path, resume: bool, device: str, progress: Progress
) -> Encoder:
    torch.set_num_threads(num_threads())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder = build_encoder(recipe.backbone, preprocess, stem=recipe.stem if recipe.stem != "auto" else "imagenet")
        module = SelfSupervised(encoder, recipe)
        batch_size = min(recipe.batch_size, len(images.pixels))
        loader = batch_loader(images.pixels, batch_size=batch_size, seed=recipe.seed)
        write_text(
            run / RECIPE, json.dumps({"recipe": recipe.to_dict(), "data_sha256": images.sha256}, indent=2) + "\n"
        )
        accelerator = _accelerator(device)
        precision = _precision(recipe.precision, accelerator)
        progress.line(
            f"{recipe.objective} on {len(images.pixels):,} images of {preprocess.image_size} px, {recipe.backbone},"
            f" {recipe.epochs} epochs, {precision} on {accelerator}"
        )
        with progress.task("training", recipe.epochs * len(loader), unit="steps") as task, _quiet_lightning():
            trainer = pl.Trainer(
                max_epochs=recipe.epochs,
                accelerator=accelerator,
                devices=1,
                precision=precision,  # type: ignore[arg-type]
                callbacks=[
                    _Recorder(run, images.pixels[:: max(1, len(images.pixels) // _CLEAN_SUBSET)][:_CLEAN_SUBSET], task)
                ],
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
            )
            checkpoint = str(run / CHECKPOINT) if resume and (run / CHECKPOINT).is_file() else None
            trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    return encoder.cpu()


class _Recorder(pl.Callback):
    """After each epoch: a line of metrics, then a checkpoint and the encoder, each file whole or not at all."""

    def __init__(self, run: Path, clean: Pixels, task: Task) -> None:
        self._run, self._clean, self._task = run, clean, task
        self._losses: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
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
        self._losses.append(outputs["loss"].detach())
        self._task.advance()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, SelfSupervised)  # the only module that this callback serves
        loss = float(torch.stack(self._losses).double().mean())
        self._losses.clear()
        if not np.isfinite(loss):
            raise MioError(
                f"the loss is not finite in epoch {trainer.current_epoch + 1}; lower learning_rate or use fp32"
                f" (the last good checkpoint is {self._run / CHECKPOINT})"
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
        self._task.advance(
            0, note=f"loss {loss:.3f}, MI {metrics['mutual_information']:.2f}, rank {metrics['effective_rank']:.0f}"
        )
        self._save(trainer, pl_module, metrics)

    def _health(self, module: SelfSupervised, loss: float) -> dict[str, float]:
        """The mutual-information estimate, and the rank of features and projections of clean training images."""
        encoder, head = module.online["encoder"], module.online["head"]
        assert isinstance(encoder, Encoder)  # ModuleDict forgets the type
        features = encoder.embed(self._clean)
        head.eval()
        with torch.inference_mode():
            projections = head(torch.from_numpy(features).to(module.device)).float().cpu().numpy()
        head.train()
        return {
            "mutual_information": module.objective.mutual_information(loss),  # type: ignore[operator]
            "effective_rank": effective_rank(features),
            "effective_rank_projections": effective_rank(projections),
        }

    def _save(self, trainer: pl.Trainer, module: SelfSupervised, metrics: dict[str, Any]) -> None:
        encoder = module.online["encoder"]
        assert isinstance(encoder, Encoder)  # ModuleDict forgets the type
        save_encoder(self._run, encoder, training={"recipe": module.recipe.to_dict(), "last": metrics})
        with staged_file(self._run / CHECKPOINT) as temporary:
            trainer.save_checkpoint(temporary)


def _accelerator(device: str) -> str:
    from mio_export.runtimes.devices import resolve_device

    return "gpu" if resolve_device(device) == "cuda" else "cpu"


def _precision(precision: str, accelerator: str) -> str:
    """Lightning's name of the precision; bf16 only where it is computed natively and so pays."""
    if precision == "auto":
        if accelerator == "gpu":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = bool(torch.cpu._is_avx512_bf16_supported())
        precision = "bf16" if native else "fp32"
    return {"bf16": "bf16-mixed", "fp32": "32-true"}[precision]


class _quiet_lightning(warnings.catch_warnings):  # noqa: N801
    """Lightning's hints (more workers, a GPU that is not used) are not for this program's users."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        warnings.filterwarnings("ignore", module="lightning_fabric")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        for name in ("pytorch_lightning", "lightning_fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        return entered


__all__ = ["TrainResult", "train"]
