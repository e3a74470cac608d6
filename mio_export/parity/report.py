"""The comparison of two sets of embeddings of the same images, and the verdict on it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mio_export.metrics import neighbor_agreement

Matrix = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How far an artifact's embeddings may lie from the encoder's."""

    min_cosine: float
    """Smallest allowed cosine of any row with its reference."""
    max_relative_error: float
    """Largest allowed ‖candidate − reference‖ / ‖reference‖ of any row."""
    min_agreement: float
    """Smallest allowed top-1 agreement of nearest neighbours."""
    source: str
    """Where these bounds come from."""


BUDGETS = {
    "fp32": Budget(
        min_cosine=0.999999,
        max_relative_error=1e-4,
        min_agreement=0.99,
        source="fp32: two orders above the rounding measured between eager PyTorch and ONNX Runtime (1e-6 relative)",
    )
}
"""The budget of each precision; there is none to set by hand."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One output at one batch size, against the reference; every error over all rows."""

    batch_size: int
    num_rows: int
    max_abs_error: float
    mean_abs_error: float
    max_relative_error: float
    """Largest ‖candidate − reference‖ / ‖reference‖ of a row."""
    mean_relative_error: float
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
    device: str
    budget: Budget
    comparisons: tuple[Comparison, ...]
    evidence: Mapping[str, str]
    """sha256 of everything that the verdict rests on: artifact, weights, images."""
    versions: Mapping[str, str]
    """Versions of the libraries that the verdict rests on."""
    problems: tuple[str, ...]
    """Why it fails; empty if it passes."""

    @property
    def passed(self) -> bool:
        """Whether something was compared and everything held."""
        return bool(self.comparisons) and not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-ready values, the verdict included."""
        return {"verdict": "proved" if self.passed else "refused", **asdict(self)}


def compare(reference: Matrix, candidate: Matrix, *, batch_size: int, budget: Budget) -> Comparison:
    """Compare embeddings row by row; anything that cannot be compared is a problem.

    Args:
        reference: the encoder's embeddings, shape (N, D).
        candidate: the artifact's embeddings of the same images, meant to be float32 of the same shape.
        batch_size: the batch size that the candidate was computed at.
        budget: the bounds.
    """
    problems = _unfit(reference, candidate)
    if problems:
        return _nothing_compared(batch_size, tuple(problems))
    reference, candidate = reference.astype(np.float64), candidate.astype(np.float64)
    difference = candidate - reference
    norms, candidate_norms = np.linalg.norm(reference, axis=1), np.linalg.norm(candidate, axis=1)
    relative = np.linalg.norm(difference, axis=1) / norms
    cosines = np.clip(
        (reference * candidate).sum(axis=1) / (norms * np.where(candidate_norms > 0, candidate_norms, 1)), -1, 1
    )
    top1 = neighbor_agreement(reference, candidate, k=1) if len(reference) > 1 else 1.0
    values = Comparison(
        batch_size=batch_size,
        num_rows=len(reference),
        max_abs_error=float(np.abs(difference).max()),
        mean_abs_error=float(np.abs(difference).mean()),
        max_relative_error=float(relative.max()),
        mean_relative_error=float(relative.mean()),
        min_cosine=float(cosines.min()),
        p1_cosine=float(np.percentile(cosines, 1)),
        mean_cosine=float(cosines.mean()),
        max_norm_drift=float(np.abs(candidate_norms / norms - 1).max()),
        top1_agreement=top1,
        recall_at_10_agreement=neighbor_agreement(reference, candidate, k=10) if len(reference) > 1 else 1.0,
        worst_row=int(relative.argmax()),
        problems=(),
    )
    return Comparison(**{**asdict(values), "problems": tuple(_beyond(values, budget))})


def _unfit(reference: Matrix, candidate: Matrix) -> list[str]:
    """Why two arrays cannot be compared at all."""
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


def _beyond(values: Comparison, budget: Budget) -> list[str]:
    """Which bounds are broken."""
    problems = []
    if not values.min_cosine >= budget.min_cosine:
        problems.append(f"row {values.worst_row}: cosine {values.min_cosine:.7f} is below {budget.min_cosine}")
    if not values.max_relative_error <= budget.max_relative_error:
        found = f"relative error {values.max_relative_error:.1e}"
        problems.append(f"row {values.worst_row}: {found} is above {budget.max_relative_error:.0e}")
    if not values.top1_agreement >= budget.min_agreement:
        problems.append(
            f"nearest neighbours agree for {values.top1_agreement:.1%} of the rows, must be {budget.min_agreement:.0%}"
        )
    return problems


def _nothing_compared(batch_size: int, problems: tuple[str, ...]) -> Comparison:
    numbers = {
        name: float("inf")
        for name in ("max_abs_error", "mean_abs_error", "max_relative_error", "mean_relative_error", "max_norm_drift")
    }
    shares = dict.fromkeys(("min_cosine", "p1_cosine", "mean_cosine", "top1_agreement", "recall_at_10_agreement"), 0.0)
    return Comparison(batch_size=batch_size, num_rows=0, worst_row=-1, problems=problems, **numbers, **shares)
