"""Evaluation of one recipe trained with several seeds: mean, deviation, and intervals of the differences."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mio_export.bundle import MANIFEST
from mio_export.console.progress import Progress
from mio_export.errors import UsageError
from mio_export.metrics import BootstrapInterval
from mio_export.models.checkpoint import DESCRIPTION, load_description
from mio_export.train.evaluation import evaluate_all
from mio_export.train.scores import Evaluation, knn_differences


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One figure over the seeds."""

    mean: float
    deviation: float
    """Standard deviation with n - 1 in the denominator; NaN with one seed."""


@dataclass(frozen=True, kw_only=True)
class SeedSummary:
    """Several seeds of one recipe beside their baselines on one data folder."""

    evaluations: Mapping[str, Evaluation]
    """By the name of the run's folder, in the order of the seeds."""
    spread: Mapping[str, Mapping[str, Spread]]
    """By row (raw pixels, PCA, untrained, trained) and column of the table."""
    differences: Mapping[str, BootstrapInterval]
    """Trained less each other row in kNN (k = 20), with its 95 % interval over test images and seeds; empty without
    labels."""
    num_test: int
    failures: tuple[str, ...]
    """Files that could not be read."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        evaluations = {name: evaluation.to_dict() for name, evaluation in self.evaluations.items()}
        return {**asdict(self), "evaluations": evaluations}


def seed_runs(folder: Path) -> list[Path]:
    """Return the folders ``seed-0``, ``seed-1``, ... by number; none if the folder is a run or a bundle itself."""
    if (folder / DESCRIPTION).is_file() or (folder / MANIFEST).is_file():
        return []
    found = {path: re.fullmatch(r"seed-(\d+)", path.name) for path in folder.glob("seed-*")}
    numbers = {path: int(match[1]) for path, match in found.items() if match and path.is_dir()}
    return sorted(numbers, key=numbers.__getitem__)


def evaluate_seeds(
    folder: str | Path,
    data: str | Path,
    *,
    probes: bool = False,
    dims: Sequence[int] = (),
    device: str = "auto",
    progress: Progress | None = None,
) -> SeedSummary:
    """Evaluate all seeds of one recipe on a folder of images.

    Each run is evaluated as ``evaluate`` does, and keeps its ``evaluation.json``.

    Args:
        folder: holds the runs ``seed-0``, ``seed-1``, ...
        data: a folder of images.
        probes: also fit linear, SGD and few-shot probes.
        dims: also score the first K projections for each K, of runs that ordered them.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: is told what is being done.

    Raises:
        UsageError: there are no runs, one is of another recipe, other images or another epoch, or there is no data.
        MioError: the folder's images cannot be used.
    """
    runs = seed_runs(Path(folder))
    if not runs:
        raise UsageError(f"{folder} holds no runs named seed-0, seed-1, ...; make them: mio train --seeds 3")
    _check_alike(runs)
    evaluations = evaluate_all(runs, Path(data), probes=probes, dims=dims, device=device, progress=progress)
    return SeedSummary(
        evaluations={run.name: evaluation for run, evaluation in zip(runs, evaluations, strict=True)},
        spread=_spread(evaluations),
        differences=knn_differences([evaluation.scores for evaluation in evaluations]),
        num_test=evaluations[0].num_test,
        failures=evaluations[0].failures,
    )


def _spread(evaluations: Sequence[Evaluation]) -> dict[str, dict[str, Spread]]:
    columns = [{name: scores.columns() for name, scores in e.scores.items()} for e in evaluations]
    return {
        row: {column: _over([figures[row][column] for figures in columns]) for column in columns[0][row]}
        for row in columns[0]
    }


def _over(values: Sequence[float]) -> Spread:
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Spread(mean=statistics.fmean(values), deviation=deviation)


def _check_alike(runs: Sequence[Path]) -> None:
    """Refuse a mean over runs that differ in more than the seed."""
    first = _identity(runs[0])
    for run in runs[1:]:
        other = _identity(run)
        keys = [key for key in first | other if first.get(key) != other.get(key)]
        changed = [f"{key}: {first.get(key)} there, {other.get(key)} here" for key in keys]
        if changed:
            raise UsageError(
                f"{run} differs from {runs[0].name} in more than the seed ({'; '.join(changed)});"
                " train all seeds alike, or evaluate them one by one"
            )


def _identity(run: Path) -> dict[str, Any]:
    """What all seeds must share: recipe, images, and how many epochs are done."""
    description = load_description(run)
    training = description.training
    if training is None:
        return {"encoder": asdict(description.encoder)}
    recipe = {key: value for key, value in training.recipe.items() if key != "seed"}
    return {**recipe, "images": training.data.sha256[:12], "epochs done": training.last.get("epoch")}


__all__ = ["SeedSummary", "Spread", "evaluate_seeds", "seed_runs"]
