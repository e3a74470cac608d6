"""``train``: from a folder of images to an encoder, with a record of how it went."""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch

from mio_export.bundle import TrainingData
from mio_export.console.progress import Progress, is_first_process
from mio_export.errors import MioError, UsageError
from mio_export.models import Encoder
from mio_export.preprocess import Preprocess
from mio_export.runtimes.devices import num_threads, resolve_device, torch_threads
from mio_export.sources import evenly_spaced
from mio_export.train.checkpoints import Checkpoints
from mio_export.train.cost import Plan, build_module, contract, plan, settled, stored
from mio_export.train.data import Data, ImageSet, load_images, mean_and_std, open_data, probe_geometry
from mio_export.train.identity import check_data, check_new, check_recipe, write_identity
from mio_export.train.loader import EpochBatches, batch_loader
from mio_export.train.recipe import Recipe
from mio_export.train.recorder import Recorder, Recording
from mio_export.train.run_files import IMAGES, METRICS
from mio_export.train.run_report import write_outputs
from mio_export.train.views import view_warnings
from mio_export.train.watchdog import NUM_CLEAN, Watchdog

_MOST_WORKERS = 8
_LIGHTNING_PRECISION: dict[str, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
}


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
    num_devices: int = 1,
    num_nodes: int = 1,
    checkpoint_steps: int = 1000,
    evaluate_every: int = 0,
    on_collapse: Literal["warn", "stop"] = "warn",
    progress: Progress | None = None,
) -> TrainResult:
    """Train an encoder on a folder of images.

    The run's folder holds ``recipe.json`` (every setting, the data's hash), ``metrics.jsonl`` (a line an epoch),
    ``checkpoints/`` (the last two, to resume from) and the encoder itself as of the last whole epoch. A run that was
    stopped at any moment and resumed ends with the same bytes as one that was not. At the end, ``report.html`` shows
    how it went.

    Args:
        recipe: the settings.
        data: a folder of images or a data set in a format that ``open_data`` knows; labels are not looked at.
        run: where to write.
        resume: go on with the run that lies there.
        device: ``auto``, ``cpu`` or ``cuda``.
        num_devices: processes on this machine, one for each GPU.
        num_nodes: machines; each runs the same command (see Lightning's and torchrun's variables).
        checkpoint_steps: steps between checkpoints within an epoch.
        evaluate_every: epochs between evaluations on held-out training images, for ``metrics.jsonl``; 0 for none.
        on_collapse: what to do when the encoder collapses.
        progress: is told how far the work is.

    Raises:
        UsageError: a setting is not allowed, or there is a run already (or none to resume, or of another recipe).
        MioError: the images cannot be used, or the loss is not finite.
        GateError: the encoder collapsed, and ``on_collapse`` is ``stop``.
    """
    run, progress = Path(run), progress or Progress()
    _check_arguments(num_devices, num_nodes, checkpoint_steps, evaluate_every, on_collapse)
    opened = open_data(data)
    accelerator = _accelerator(device)
    recipe = settled(recipe, probe_geometry(opened.train), accelerator)
    if resume:
        check_recipe(run, recipe)
    elif is_first_process():
        check_new(run)
    run.mkdir(parents=True, exist_ok=True)
    images, preprocess = _loaded(opened, recipe, run, shared=num_devices > 1, progress=progress)
    identity = TrainingData(num_images=len(images.pixels), sha256=images.sha256)
    if resume:
        check_data(run, identity)
    elif is_first_process():
        Checkpoints(run).clear()
        write_identity(run, recipe, identity)
    recording = Recording(
        run=run, checkpoint_steps=checkpoint_steps, evaluate_every=evaluate_every, on_collapse=on_collapse
    )
    encoder = _fit(recipe, preprocess, images, identity, recording, accelerator, (num_devices, num_nodes), progress)
    if is_first_process():
        shutil.rmtree(run / IMAGES, ignore_errors=True)  # needed to go on, and there is nothing left to do
    last = json.loads((run / METRICS).read_text().splitlines()[-1])
    return TrainResult(run=run, recipe=recipe, encoder=encoder.eval(), metrics=last, failures=images.failures)


def plan_training(recipe: Recipe, data: str | Path | None, *, device: str = "auto", num_devices: int = 1) -> Plan:
    """Return what ``train`` would do; nothing is decoded or written.

    Raises:
        UsageError: a setting is not allowed, or the recipe needs ``data`` to settle.
    """
    opened = None if data is None else open_data(data)
    geometry = None if opened is None else probe_geometry(opened.train)
    recipe = settled(recipe, geometry, _accelerator(device))
    return plan(recipe, num_images=None if opened is None else len(opened.train), num_devices=num_devices)


def _check_arguments(
    num_devices: int, num_nodes: int, checkpoint_steps: int, evaluate_every: int, on_collapse: str
) -> None:
    counts = {"devices": num_devices, "nodes": num_nodes, "checkpoint_steps": checkpoint_steps}
    for name, value in counts.items():
        if value < 1:
            raise UsageError(f"{name} must be 1 or more, got {value}")
    if evaluate_every < 0:
        raise UsageError(f"evaluate_every must be 0 or more, got {evaluate_every}")
    if on_collapse not in ("warn", "stop"):
        raise UsageError(f"on_collapse must be warn or stop, got {on_collapse!r}")


def _accelerator(device: str) -> str:
    return "gpu" if resolve_device(device, library="torch") == "cuda" else "cpu"


def _loaded(
    opened: Data, recipe: Recipe, run: Path, *, shared: bool, progress: Progress
) -> tuple[ImageSet, Preprocess]:
    """Return the training images and the encoder's contract; several processes share one decoded copy on the disk."""
    memory_bytes = 0 if shared or _is_torchrun() else None
    images = load_images(
        opened.train, stored(contract(recipe)), progress, scratch=run / IMAGES, memory_bytes=memory_bytes
    )
    if len(images.pixels) < 2:
        raise MioError("the data holds one training image; an objective needs at least two")
    notes = (*opened.notes, *view_warnings(recipe.views, opened.class_names))
    for note in (*notes, *(f"left out: {failure}" for failure in images.failures)):
        progress.line(note)
    return images, contract(recipe, *mean_and_std(images))


def _fit(
    recipe: Recipe,
    preprocess: Preprocess,
    images: ImageSet,
    identity: TrainingData,
    recording: Recording,
    accelerator: str,
    devices_and_nodes: tuple[int, int],
    progress: Progress,
) -> Encoder:
    num_devices, num_nodes = _by_torchrun() or devices_and_nodes
    batches = _batches(recipe, len(images.pixels), num_processes=num_devices * num_nodes)
    clean = images.pixels[evenly_spaced(range(len(images.pixels)), NUM_CLEAN)]
    checkpoint = Checkpoints(recording.run).latest(progress)
    if checkpoint is not None:
        position = checkpoint.state["callbacks"][Recorder.__qualname__]
        batches.start_at(position["epoch"], position["batch"])
    with torch_threads(max(1, num_threads() // num_devices)), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        module = build_module(recipe, preprocess, num_batches=len(batches))
        progress.line(
            f"{recipe.objective} on {len(images.pixels):,} images of {preprocess.image_size} px, {recipe.backbone},"
            f" {recipe.epochs} epochs, {recipe.precision} on {accelerator}"
        )
        with progress.task("training", recipe.epochs * len(batches), unit="steps") as task, _quiet_lightning():
            recorder = Recorder(
                recording,
                images,
                data=identity,
                batches=batches,
                watchdog=Watchdog(clean, module.objective.monitor()),
                progress=progress,
                task=task,
            )
            trainer = _trainer(recipe, recorder, accelerator, num_devices, num_nodes)
            batches.rank = trainer.global_rank
            workers = min(_MOST_WORKERS, num_threads()) if isinstance(images.pixels, np.memmap) else 0
            loader = batch_loader(images.pixels, batches, num_workers=workers)
            trainer.fit(module, loader, ckpt_path=None if checkpoint is None else checkpoint.path, weights_only=True)
        module.cpu()
        if trainer.is_global_zero:
            write_outputs(recording.run, module, clean)
    return module.online.encoder


def _by_torchrun() -> tuple[int, int] | None:
    """Devices and nodes as torchrun has set them; None without it."""
    if not _is_torchrun():
        return None
    num_devices = int(os.environ["LOCAL_WORLD_SIZE"])
    return num_devices, int(os.environ["WORLD_SIZE"]) // num_devices


def _is_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _trainer(recipe: Recipe, recorder: Recorder, accelerator: str, num_devices: int, num_nodes: int) -> pl.Trainer:
    several = num_devices * num_nodes > 1
    return pl.Trainer(
        max_epochs=recipe.epochs,
        accelerator=accelerator,
        devices=num_devices,
        num_nodes=num_nodes,
        strategy="ddp" if several else "auto",
        sync_batchnorm=several and accelerator == "gpu",
        use_distributed_sampler=False,
        precision=_LIGHTNING_PRECISION[recipe.precision],
        accumulate_grad_batches=recipe.accumulate,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def _batches(recipe: Recipe, num_images: int, *, num_processes: int) -> EpochBatches:
    """The order of the images."""
    if recipe.batch_size % num_processes:
        raise UsageError(f"batch_size {recipe.batch_size} cannot be shared equally by {num_processes} processes")
    batch_size = min(recipe.batch_size, num_images // num_processes * num_processes)
    if batch_size < 2 * num_processes:
        raise MioError(f"{num_images:,} training images are too few for {num_processes} processes")
    return EpochBatches(num_images, batch_size=batch_size, seed=recipe.seed, num_processes=num_processes)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning's hints (more workers, a GPU that is not used) are not for this program's users."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")
        warnings.filterwarnings("ignore", module="lightning_fabric")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        yield


__all__ = ["TrainResult", "plan_training", "train"]
