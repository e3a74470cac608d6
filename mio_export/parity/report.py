"""The comparison of two sets of embeddings of the same images, and the verdict on it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mio_export.bundle import Verdict
from mio_export.metrics import leave_one_out_accuracy, neighbor_agreement
from mio_export.parity.budget import Budget

Matrix = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One device at one batch size, against the reference; every error over all rows."""

    device: str
    batch_size: int
    num_rows: int
    max_abs_error: float
    mean_abs_error: float
    max_relative_error: float
    """Largest ‖candidate − reference‖ / ‖reference‖ of a row."""
    rms_relative_error: float
    """Root mean square of the same over the rows."""
    min_cosine: float
    p1_cosine: float
    """First percentile of the rows' cosines."""
    mean_cosine: float
    max_norm_drift: float
    """Largest |‖candidate‖ / ‖reference‖ − 1| of a row."""
    top1_agreement: float
    """Share of rows whose nearest other row is the same."""
    recall_at_10_agreement: float
    """Mean share of each row's ten nearest other rows that are the same."""
    knn_change: float | None
    """Change of the leave-one-out kNN accuracy; None without labels."""
    worst_row: int
    """Index of the row with the largest relative error."""
    problems: tuple[str, ...]
    """Why it fails; empty if it passes."""


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """What was compared with what, held to which budget, with which result."""

    artifact: str
    format: str
    precision: str
    runtime: str
    devices: tuple[str, ...]
    """Where it was run."""
    options: Mapping[str, str]
    """What the runtime was told."""
    budget: Budget
    requirements: Mapping[str, float]
    """What was asked for beyond the precision's own budget."""
    own_rms_error: float
    """Root mean square over rows of the float32 encoder's relative error against float64."""
    comparisons: tuple[Comparison, ...]
    golden: Mapping[str, float]
    """Relative error of each golden image."""
    shapes: Mapping[str, str]
    """What became of shapes beyond the contract: ``accepted`` or ``rejected``."""
    stages: tuple[Mapping[str, Any], ...]
    """What each stage of the export did to the error, in order."""
    evidence: Mapping[str, Any]
    """sha256 of everything that the verdict rests on: artifact, its companions, weights, images, golden images."""
    versions: Mapping[str, str]
    """Versions of the libraries that the verdict rests on."""
    problems: tuple[str, ...]
    """Why it fails; empty if it passes."""
    unproven: str | None = None
    """Why it could not be run here; None if it was."""

    @property
    def verdict(self) -> Verdict:
        """``proved`` only if something was compared and everything held."""
        if self.unproven is not None and not self.problems:
            return "unproven"
        return "proved" if self.comparisons and not self.problems else "refused"

    @property
    def passed(self) -> bool:
        """Whether it was run and everything held."""
        return self.verdict == "proved"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values, the verdict included."""
        return {"verdict": self.verdict, **asdict(self)}


def compare(
    reference: Matrix,
    candidate: Matrix,
    *,
    budget: Budget,
    batch_size: int,
    device: str = "cpu",
    labels: Labels | None = None,
) -> Comparison:
    """Compare embeddings row by row; anything that cannot be compared is a problem.

    Args:
        reference: the encoder's embeddings, shape (N, D).
        candidate: the artifact's embeddings of the same images, meant to be float32 of the same shape.
        budget: the bounds.
        batch_size: the batch size that the candidate was computed at.
        device: where it was computed.
        labels: classes of the images, shape (N,), if they have some.
    """
    problems = unfit(reference, candidate)
    if problems:
        return _nothing_compared(device, batch_size, tuple(problems))
    reference, candidate = reference.astype(np.float64), candidate.astype(np.float64)
    difference = candidate - reference
    norms, candidate_norms = np.linalg.norm(reference, axis=1), np.linalg.norm(candidate, axis=1)
    relative = relative_errors(reference, candidate)
    cosines = np.clip(
        (reference * candidate).sum(axis=1) / (norms * np.where(candidate_norms > 0, candidate_norms, 1)), -1, 1
    )
    alone = len(reference) == 1
    values: dict[str, Any] = {
        "device": device,
        "batch_size": batch_size,
        "num_rows": len(reference),
        "max_abs_error": float(np.abs(difference).max()),
        "mean_abs_error": float(np.abs(difference).mean()),
        "max_relative_error": float(relative.max()),
        "rms_relative_error": math.sqrt(float((relative**2).mean())),
        "min_cosine": float(cosines.min()),
        "p1_cosine": float(np.percentile(cosines, 1)),
        "mean_cosine": float(cosines.mean()),
        "max_norm_drift": float(np.abs(candidate_norms / norms - 1).max()),
        "top1_agreement": 1.0 if alone else neighbor_agreement(reference, candidate, k=1),
        "recall_at_10_agreement": 1.0 if alone else neighbor_agreement(reference, candidate, k=10),
        "knn_change": None if labels is None else _knn_change(reference, candidate, labels),
        "worst_row": int(relative.argmax()),
    }
    return Comparison(**values, problems=tuple(_beyond(values, budget)))


def relative_errors(reference: Matrix, candidate: Matrix) -> npt.NDArray[np.float64]:
    """Return ‖candidate − reference‖ / ‖reference‖ of each row, shape (N,)."""
    reference = reference.astype(np.float64)
    errors: npt.NDArray[np.float64] = np.linalg.norm(candidate - reference, axis=1) / np.linalg.norm(reference, axis=1)
    return errors


def unfit(reference: Matrix, candidate: Matrix) -> list[str]:
    """Return why two arrays cannot be compared at all; empty if they can."""
    if reference.ndim != 2 or not reference.size:
        return [f"nothing to compare: the reference has shape {reference.shape}"]
    if candidate.shape != reference.shape:
        return [f"output has shape {candidate.shape}, the encoder gives {reference.shape}"]
    if candidate.dtype != np.float32:
        return [f"output is {candidate.dtype}, must be float32"]
    problems = []
    if not np.isfinite(reference).all():
        problems.append("the encoder itself gives NaN or infinite embeddings")
    elif not np.linalg.norm(reference, axis=1).all():
        problems.append("the encoder itself gives a zero embedding")
    num_bad = int((~np.isfinite(candidate)).any(axis=1).sum())
    if num_bad:
        problems.append(f"{num_bad} of {len(candidate)} rows are NaN or infinite")
    return problems


def _knn_change(reference: Matrix, candidate: Matrix, labels: Labels) -> float:
    return leave_one_out_accuracy(candidate, labels) - leave_one_out_accuracy(reference, labels)


def _beyond(values: Mapping[str, Any], budget: Budget) -> list[str]:
    """Which bounds are broken, the most telling first; a comparison with NaN is always one of them."""
    row = f"row {values['worst_row']}"
    checks: list[tuple[str, float, float | None, str]] = [
        ("max_relative_error", -1, budget.max_row_error, f"{row}: relative error {{:.1e}} is above {{:.1e}}"),
        ("rms_relative_error", -1, budget.max_rms_error, "relative error {:.1e} (rms over rows) is above {:.1e}"),
        ("min_cosine", 1, budget.min_cosine, f"{row}: cosine {{:.7f}} is below {{}}"),
        ("p1_cosine", 1, budget.p1_cosine, "first percentile of cosines {:.7f} is below {}"),
        ("mean_cosine", 1, budget.mean_cosine, "mean cosine {:.7f} is below {}"),
        ("max_norm_drift", -1, budget.max_norm_drift, "norm drift {:.1e} is above {}"),
        ("top1_agreement", 1, budget.top1, "nearest neighbours agree for {:.1%} of the rows, must be {:.0%}"),
        ("recall_at_10_agreement", 1, budget.recall_at_10, "recall@10 {:.1%} is below {:.0%}"),
    ]
    problems = [
        text.format(values[name], bound)
        for name, sign, bound, text in checks
        if bound is not None and not sign * values[name] >= sign * bound
    ]
    return problems + _beyond_knn(values, budget)


def _beyond_knn(values: Mapping[str, Any], budget: Budget) -> list[str]:
    """One image may always change sides: among few images its share says nothing."""
    change = values["knn_change"]
    allowed = max(budget.max_knn_change, 1 / values["num_rows"])
    if change is None or abs(change) <= allowed + 1e-12:
        return []
    return [f"kNN accuracy changes by {change:+.1%}, at most {allowed:.1%} is allowed"]


def _nothing_compared(device: str, batch_size: int, problems: tuple[str, ...]) -> Comparison:
    return Comparison(
        device=device,
        batch_size=batch_size,
        num_rows=0,
        max_abs_error=math.inf,
        mean_abs_error=math.inf,
        max_relative_error=math.inf,
        rms_relative_error=math.inf,
        min_cosine=0.0,
        p1_cosine=0.0,
        mean_cosine=0.0,
        max_norm_drift=math.inf,
        top1_agreement=0.0,
        recall_at_10_agreement=0.0,
        knn_change=None,
        worst_row=-1,
        problems=problems,
    )
