"""``train``: from a folder of images to an encoder, with a record of how it went."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch

from mio_export.bundle import TrainingData
from mio_export.errors import MioError, UsageError
from mio_export.files import write_text
from mio_export.models import Encoder, build_encoder
from mio_export.preprocess import Pixels, Preprocess
from mio_export.progress import Progress
from mio_export.runtimes.devices import num_threads, resolve_device
from mio_export.sources import spread
from mio_export.train.image_set import Geometry, ImageSet, load_images, mean_and_std, probe_geometry, split_folder
from mio_export.train.module import SelfSupervised, batch_loader
from mio_export.train.recipe import Recipe
from mio_export.train.recorder import CHECKPOINT, Recorder
from mio_export.train.run_report import METRICS, RECIPE

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
    resume from) and the encoder itself, all of it as of the last whole epoch. At the end, ``report.html`` shows how it
    went.

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
    accelerator = "gpu" if resolve_device(device, library="torch") == "cuda" else "cpu"
    recipe = _settled(recipe, probe_geometry(split.train), accelerator)
    _check_run(run, recipe, resume)
    preprocess = _contract(recipe, (0.5,), (0.5,))
    images = load_images(split.train, split, preprocess, progress)
    preprocess = _contract(recipe, *mean_and_std(images))
    if resume:
        _check_data(run, images)
    if len(images.pixels) < 2:
        raise MioError(f"{data} holds one training image; an objective needs at least two")
    for note in (*split.notes, *(f"left out: {failure}" for failure in images.failures)):
        progress.line(note)
    encoder = _fit(recipe, preprocess, images, run, resume, accelerator, progress)
    last = json.loads((run / METRICS).read_text().splitlines()[-1])
    return TrainResult(run=run, recipe=recipe, encoder=encoder.eval(), metrics=last, failures=images.failures)


def stored_recipe(run: Path) -> dict[str, Any]:
    """Return the settings of a run, as JSON-ready values.

    Raises:
        UsageError: there is no run.
    """
    path = run / RECIPE
    if not path.is_file():
        raise UsageError(f"{run} holds no run to resume")
    values: dict[str, Any] = json.loads(path.read_text())["recipe"]
    return values


def _settled(recipe: Recipe, geometry: Geometry, accelerator: str) -> Recipe:
    """Turn every ``auto`` into a value."""
    size = recipe.image_size or geometry.image_size
    is_small = size <= _SMALL_IMAGE
    backbone = recipe.backbone if recipe.backbone != "auto" else ("small" if is_small else "torchvision/resnet18")
    stem = (
        recipe.stem
        if recipe.stem != "auto"
        else ("small" if is_small and not backbone.startswith("timm/") else "imagenet")
    )
    channels = recipe.channels or geometry.channels
    precision = recipe.precision if recipe.precision != "auto" else _native_precision(accelerator)
    return replace(recipe, image_size=size, channels=channels, backbone=backbone, stem=stem, precision=precision)


def _contract(recipe: Recipe, mean: tuple[float, ...], std: tuple[float, ...]) -> Preprocess:
    assert recipe.image_size is not None  # settled
    assert recipe.channels is not None
    if len(mean) != recipe.channels:
        mean, std = mean * recipe.channels, std * recipe.channels
    return Preprocess(image_size=recipe.image_size, channels=recipe.channels, mean=mean, std=std)


def _check_run(run: Path, recipe: Recipe, resume: bool) -> None:
    if not resume:
        if (run / RECIPE).exists():
            raise UsageError(f"{run} holds a run already; go on with it: --resume, or choose another -o")
        run.mkdir(parents=True, exist_ok=True)
        return
    stored, given = stored_recipe(run), recipe.to_dict()
    changed = [f"{key}: {stored.get(key)} there, {given[key]} now" for key in given if stored.get(key) != given[key]]
    if changed:
        raise UsageError(
            f"{run} is a run of another recipe ({'; '.join(changed)}); give the same settings or choose another -o"
        )


def _check_data(run: Path, images: ImageSet) -> None:
    if json.loads((run / RECIPE).read_text())["data"]["sha256"] != images.sha256:
        raise UsageError(f"{run} was begun on other images (files were added, removed or changed); choose another -o")


def _fit(
    recipe: Recipe,
    preprocess: Preprocess,
    images: ImageSet,
    run: Path,
    resume: bool,
    accelerator: str,
    progress: Progress,
) -> Encoder:
    torch.set_num_threads(num_threads())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder = build_encoder(recipe.backbone, preprocess, stem=recipe.stem if recipe.stem != "auto" else "imagenet")
        module = SelfSupervised(encoder, recipe)
        batch_size = min(recipe.batch_size, len(images.pixels))
        loader = batch_loader(images.pixels, batch_size=batch_size, seed=recipe.seed)
        data = TrainingData(num_images=len(images.pixels), sha256=images.sha256)
        write_text(run / RECIPE, json.dumps({"recipe": recipe.to_dict(), "data": asdict(data)}, indent=2) + "\n")
        progress.line(
            f"{recipe.objective} on {len(images.pixels):,} images of {preprocess.image_size} px, {recipe.backbone},"
            f" {recipe.epochs} epochs, {recipe.precision} on {accelerator}"
        )
        with progress.task("training", recipe.epochs * len(loader), unit="steps") as task, _quiet_lightning():
            trainer = pl.Trainer(
                max_epochs=recipe.epochs,
                accelerator=accelerator,
                devices=1,
                precision="bf16-mixed" if recipe.precision == "bf16" else "32-true",
                callbacks=[Recorder(run, _clean_subset(images.pixels), task, data=data)],
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
            )
            checkpoint = str(run / CHECKPOINT) if resume and (run / CHECKPOINT).is_file() else None
            trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    return encoder.cpu()


def _clean_subset(pixels: Pixels) -> Pixels:
    """At most 512 training images, evenly spread, to measure ranks on."""
    return pixels[spread(range(len(pixels)), _CLEAN_SUBSET)]


def _native_precision(accelerator: str) -> Literal["fp32", "bf16"]:
    """bf16 where it is computed natively and so pays, fp32 elsewhere."""
    if accelerator == "gpu":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = bool(torch.cpu._is_avx512_bf16_supported())
    return "bf16" if native else "fp32"


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


__all__ = ["TrainResult", "stored_recipe", "train"]
