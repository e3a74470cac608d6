"""Evaluation: kNN and label-free copy retrieval, always beside raw pixels, PCA and the untrained encoder."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from mio_export.files import write_text
from mio_export.metrics import knn_accuracy, retrieval_recall
from mio_export.models import Encoder, load_encoder
from mio_export.models.checkpoint import DESCRIPTION, EVALUATION, load_description
from mio_export.preprocess import Pixels
from mio_export.progress import Progress
from mio_export.train.image_set import ImageSet, load_images, split_folder
from mio_export.train.probes import few_shot, linear_probe
from mio_export.train.run_report import write_report
from mio_export.train.views import ViewConfig, random_view

_PCA_DIM = 128
_LARGEST_RAW = 64
_SHRUNK = 32
_COPY_SEED = 20211
COPY_VIEW = ViewConfig(
    crop_area=(0.4, 1.0),
    crop_aspect=(1.0, 1.0),
    flip_probability=0.5,
    brightness=0.4,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    jitter_probability=1.0,
    grayscale_probability=0.0,
)
"""The fixed augmentation of copy retrieval."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How one way of embedding did."""

    knn: Mapping[int, float] | None
    """Accuracy of the kNN classifier for each k; None without labels."""
    copy_recall: Mapping[int, float]
    """Share of test images whose augmented copy finds them among its k nearest, for each k."""
    linear: float | None = None
    """Accuracy of the linear probe; None without labels, or if probes were not asked for."""
    few_shot: Mapping[int, float] | None = None
    """Mean accuracy of probes on 1, 5 and 10 images of each class; None likewise."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An encoder beside its baselines on one data folder."""

    scores: Mapping[str, Scores]
    """By row: raw pixels, PCA, untrained, trained."""
    num_train: int
    num_test: int
    num_classes: int | None
    failures: tuple[str, ...]
    """Files that could not be read."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        return asdict(self)


def evaluate(
    path: str | Path, data: str | Path, *, probes: bool = False, progress: Progress | None = None
) -> Evaluation:
    """Evaluate the encoder of a run or a bundle on a folder of images.

    The whole test part counts, in eval mode and float32; nothing is chosen on it. Where class folders give labels,
    a kNN classifier with the training part as its bank is scored. Copy retrieval needs none: each test image is
    embedded, and one augmented copy of each (crop area 0.4-1.0, flip 0.5, brightness 0.6-1.4, one seed) must find its
    original. A run keeps the result as ``evaluation.json``, shows it in ``report.html``, and an export from it
    carries it along.

    Args:
        path: a training run or a bundle.
        data: a folder of images.
        probes: also fit linear and few-shot probes, which takes minutes; they need labels.
        progress: is told what is being done.

    Raises:
        UsageError: there is no run, bundle or folder.
        MioError: the folder's images cannot be used.
    """
    progress = progress or Progress()
    path = Path(path)
    encoder = load_encoder(path)
    split = split_folder(Path(data))
    for note in split.notes:
        progress.line(note)
    train, test = (load_images(files, split, encoder.preprocess, progress) for files in (split.train, split.test))
    description = load_description(path) if (path / DESCRIPTION).is_file() else None
    seed = description.training.recipe["seed"] if description and description.training else 0
    evaluation = evaluate_encoder(encoder, train, test, seed=seed, probes=probes, progress=progress)
    if description is not None:
        values = {
            "weights_sha256": description.weights_sha256,
            "data_sha256": {"train": train.sha256, "test": test.sha256},
            **evaluation.to_dict(),
        }
        write_text(path / EVALUATION, json.dumps(values, indent=2) + "\n")
        write_report(path)
    return evaluation


def evaluate_encoder(
    encoder: Encoder,
    train: ImageSet,
    test: ImageSet,
    *,
    seed: int = 0,
    probes: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate an encoder on images in memory; ``seed`` is the run's, from which it drew its untrained weights."""
    progress = progress or Progress()
    copies = augmented_copies(test.pixels)
    embedders = {
        "raw pixels": _raw,
        "PCA": _pca(train.pixels),
        "untrained": encoder.untrained(seed=seed).embed,
        "trained": encoder.embed,
    }
    scores = {}
    for name, embed in embedders.items():
        progress.line(f"evaluating: {name}")
        bank, queries, copied = (embed(pixels) for pixels in (train.pixels, test.pixels, copies))
        scores[name] = _scores(bank, queries, copied, train.labels, test.labels, probes=probes)
    return Evaluation(
        scores=scores,
        num_train=len(train.pixels),
        num_test=len(test.pixels),
        num_classes=len(train.class_names) or None,
        failures=(*train.failures, *test.failures),
    )


def augmented_copies(pixels: Pixels) -> Pixels:
    """Return the fixed augmented copy of each image, uint8, shape (N, H, W, C)."""
    generator = torch.Generator().manual_seed(_COPY_SEED)
    copies = random_view(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), COPY_VIEW, generator)
    return copies.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _scores(
    train: npt.NDArray[np.float32],
    test: npt.NDArray[np.float32],
    copies: npt.NDArray[np.float32],
    train_labels: npt.NDArray[np.int64] | None,
    test_labels: npt.NDArray[np.int64] | None,
    *,
    probes: bool,
) -> Scores:
    scores = Scores(knn=None, copy_recall=retrieval_recall(copies, test))
    if train_labels is None or test_labels is None:
        return scores
    labelled = (train, train_labels, test, test_labels)
    scores = replace(scores, knn=knn_accuracy(*labelled))
    return replace(scores, linear=linear_probe(*labelled), few_shot=few_shot(*labelled)) if probes else scores


def _raw(pixels: Pixels) -> npt.NDArray[np.float32]:
    """Pixels as rows; images above 64 px are averaged down to 32 px first, or the rows would not fit in memory."""
    if pixels.shape[1] <= _LARGEST_RAW:
        return pixels.reshape(len(pixels), -1).astype(np.float32)
    blocks = torch.from_numpy(pixels).split(256)
    small = [F.interpolate(block.permute(0, 3, 1, 2).float(), size=_SHRUNK, mode="area") for block in blocks]
    return torch.cat(small).flatten(1).numpy()


def _pca(pixels: Pixels) -> Any:
    """Fit PCA on the training pixels; return what embeds with it."""
    from sklearn.decomposition import PCA

    rows = _raw(pixels)
    pca = PCA(min(_PCA_DIM, *rows.shape), svd_solver="randomized", random_state=0).fit(rows)
    return lambda images: pca.transform(_raw(images)).astype(np.float32)
