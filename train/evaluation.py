"""Evaluation: kNN, probes and label-free copy retrieval, always beside raw pixels, PCA and the untrained encoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mio_export.console.progress import Progress
from mio_export.errors import UsageError
from mio_export.metrics import HEADLINE_K, knn_predictions, retrieval_recall
from mio_export.models import Encoder, load_encoder
from mio_export.models.checkpoint import DESCRIPTION, EVALUATION, EVALUATION_SCHEMA_VERSION, load_description
from mio_export.preprocess import Pixels
from mio_export.runtimes.devices import exact_float32, resolve_device
from mio_export.schema import write_json
from mio_export.train.baselines import Embed, fitted_pca, raw_pixels
from mio_export.train.data import ImageSet, load_images, open_data
from mio_export.train.probes import few_shot, linear_probe, sgd_probe
from mio_export.train.run_report import write_report
from mio_export.train.scores import TRAINED, UNTRAINED, Evaluation, Scores, knn_differences
from mio_export.train.truncation import Rows, Truncation, truncations
from mio_export.train.views import ViewConfig, random_view

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


def evaluate(
    path: str | Path,
    data: str | Path,
    *,
    probes: bool = False,
    dims: Sequence[int] = (),
    device: str = "auto",
    progress: Progress | None = None,
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
        probes: also fit linear, SGD and few-shot probes, which takes minutes; they need labels.
        dims: also score the first K projections for each K, of a run that ordered them (MINC, ``loss.ordered=true``).
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: is told what is being done.

    Raises:
        UsageError: there is no run, bundle or folder, or ``dims`` do not fit the run.
        MioError: the folder's images cannot be used.
        MissingBackendError: CUDA is asked for and there is none.
    """
    return evaluate_all([Path(path)], Path(data), probes=probes, dims=dims, device=device, progress=progress)[0]


def evaluate_all(
    paths: Sequence[Path],
    data: Path,
    *,
    probes: bool = False,
    dims: Sequence[int] = (),
    device: str = "auto",
    progress: Progress | None = None,
) -> list[Evaluation]:
    """Do what ``evaluate`` does for several encoders of one decode contract; images and baselines are theirs alike.

    Raises:
        UsageError: as ``evaluate``, or the contracts differ.
    """
    device, progress = resolve_device(device, library="torch"), progress or Progress()
    encoders = [load_encoder(path) for path in paths]
    encoder = encoders[0]
    for path, other in zip(paths, encoders, strict=True):
        if other.preprocess != encoder.preprocess:
            raise UsageError(f"{path} and {paths[0]} decode images differently; evaluate them one by one")
    truncated = {path: truncations(path, dims) for path in paths}
    opened = open_data(data)
    for note in opened.notes:
        progress.line(note)
    train, test = (load_images(part, encoder.preprocess, progress) for part in (opened.labelled, opened.test))
    baselines = baseline_scores(train, test, probes=probes, progress=progress)
    evaluations = []
    for path, encoder in zip(paths, encoders, strict=True):
        if len(paths) > 1:
            progress.line(f"{path.name}:")
        evaluation = evaluate_encoder(
            encoder.to(device),
            train,
            test,
            seed=_seed(path),
            probes=probes,
            baselines=baselines,
            truncated=truncated[path],
            progress=progress,
        )
        _keep(path, evaluation, train, test)
        evaluations.append(evaluation)
    return evaluations


def evaluate_encoder(
    encoder: Encoder,
    train: ImageSet,
    test: ImageSet,
    *,
    seed: int = 0,
    probes: bool = False,
    baselines: Mapping[str, Scores] | None = None,
    truncated: Mapping[str, Truncation] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate an encoder, on the device where it is, on images in memory.

    Args:
        encoder: its modes, buffers and weights stay as they are.
        train: the bank of kNN and the probes' training rows.
        test: what is scored.
        seed: the run's, from which it drew its untrained weights.
        probes: also fit probes.
        baselines: what ``baseline_scores`` gave for these images; None computes it.
        truncated: more rows, made from the trained features.
        progress: is told what is being done.
    """
    progress = progress or Progress()
    device = encoder.mean.device
    exam = _Exam(train=train, test=test, copies=augmented_copies(test.pixels), probes=probes, progress=progress)
    scores = dict(baselines or baseline_scores(train, test, probes=probes, progress=progress))
    with exact_float32(device.type):
        scores[UNTRAINED] = exam.scores(UNTRAINED, encoder.untrained(seed=seed).to(device).embed)
        features = exam.embedded(TRAINED, encoder.embed)
        scores[TRAINED] = exam.graded(*features)
    for name, truncate in (truncated or {}).items():
        scores[name] = exam.graded(*(truncate(rows) for rows in features))
    return Evaluation(
        scores=scores,
        differences=knn_differences([scores]),
        num_train=len(train.pixels),
        num_test=len(test.pixels),
        num_classes=len(train.class_names) or None,
        failures=(*train.failures, *test.failures),
        device=device.type,
    )


def baseline_scores(
    train: ImageSet, test: ImageSet, *, probes: bool = False, progress: Progress | None = None
) -> dict[str, Scores]:
    """Return the scores of raw pixels and of PCA."""
    copies = augmented_copies(test.pixels)
    exam = _Exam(train=train, test=test, copies=copies, probes=probes, progress=progress or Progress())
    return {
        "raw pixels": exam.scores("raw pixels", raw_pixels),
        "PCA": exam.scores("PCA", fitted_pca(train.pixels)),
    }


def augmented_copies(pixels: Pixels) -> Pixels:
    """Return the fixed augmented copy of each image, uint8, shape (N, H, W, C)."""
    generator = torch.Generator().manual_seed(_COPY_SEED)
    copies = random_view(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), COPY_VIEW, generator)
    return copies.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


@dataclass(frozen=True, kw_only=True)
class _Exam:
    """The evaluation protocol, applied to one embedding."""

    train: ImageSet
    test: ImageSet
    copies: Pixels
    probes: bool
    progress: Progress

    def scores(self, name: str, embed: Embed) -> Scores:
        return self.graded(*self.embedded(name, embed))

    def embedded(self, name: str, embed: Embed) -> tuple[Rows, Rows, Rows]:
        """Embeddings of the training images, the test images and their copies, shape (N, D) each."""
        self.progress.line(f"evaluating: {name}")
        return embed(self.train.pixels), embed(self.test.pixels), embed(self.copies)

    def graded(self, bank: Rows, queries: Rows, copies: Rows) -> Scores:
        scores = Scores(knn=None, copy_recall=retrieval_recall(copies, queries))
        truth = self.test.labels
        if self.train.labels is None or truth is None:
            return scores
        correct = {k: found == truth for k, found in knn_predictions(bank, self.train.labels, queries).items()}
        knn = {k: float(right.mean()) for k, right in correct.items()}
        scores = replace(scores, knn=knn, correct=correct[HEADLINE_K])
        if not self.probes:
            return scores
        labelled = (bank, self.train.labels, queries, truth)
        return replace(scores, linear=linear_probe(*labelled), sgd=sgd_probe(*labelled), few_shot=few_shot(*labelled))


def _seed(path: Path) -> int:
    """The seed of a run, 0 if it names none."""
    description = load_description(path) if (path / DESCRIPTION).is_file() else None
    return int(description.training.recipe["seed"]) if description and description.training else 0


def _keep(path: Path, evaluation: Evaluation, train: ImageSet, test: ImageSet) -> None:
    """Write the evaluation beside the encoder, if it lies in a run; a bundle is never changed."""
    if not (path / DESCRIPTION).is_file():
        return
    values = {
        "schema_version": EVALUATION_SCHEMA_VERSION,
        "weights_sha256": load_description(path).weights_sha256,
        "data_sha256": {"train": train.sha256, "test": test.sha256},
        **evaluation.to_dict(),
    }
    write_json(path / EVALUATION, values)
    write_report(path)


__all__ = [
    "COPY_VIEW",
    "Evaluation",
    "Scores",
    "augmented_copies",
    "baseline_scores",
    "evaluate",
    "evaluate_all",
    "evaluate_encoder",
]
