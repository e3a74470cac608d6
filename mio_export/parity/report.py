"""The comparison of two sets of embeddings of the same images."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mio_export.evidence.budget import Budget
from mio_export.evidence.report import Comparison, ParityReport, beyond_budget
from mio_export.metrics import leave_one_out_accuracy, neighbor_agreement

Matrix = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int64]


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
    return Comparison(**values, problems=tuple(beyond_budget(values, budget)))


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


__all__ = ["Comparison", "Labels", "Matrix", "ParityReport", "compare", "relative_errors", "unfit"]
