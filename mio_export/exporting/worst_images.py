"""The images that an artifact gets most wrong, with their nearest neighbours before and after."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mio_export.metrics import l2_normalized

Matrix = npt.NDArray[np.floating[Any]]
_WORST = 6
_NEIGHBORS = 4
_MOST_THUMBNAILS = 30
_TIE = 1e-6


@dataclass(frozen=True, kw_only=True)
class WorstImage:
    """One image, how wrong its embedding is, and what lies near it."""

    row: int
    relative_error: float
    """‖candidate − reference‖ / ‖reference‖; infinite for an embedding that is not finite."""
    before: tuple[int, ...]
    """Its nearest other rows by the reference, the nearest first."""
    after: tuple[int, ...]
    """The same by the candidate; empty if its embedding is not finite."""
    changed: frozenset[int]
    """Those of ``after`` that are not near by the reference, equal cosines (within 1e-6) allowed for."""


def relative_errors(reference: Matrix, candidate: Matrix) -> npt.NDArray[np.float64]:
    """Return ‖candidate − reference‖ / ‖reference‖ of each row, float64, shape (N,); infinite where there is none."""
    reference = reference.astype(np.float64)
    with np.errstate(all="ignore"):
        norms = np.linalg.norm(reference, axis=1)
        errors: npt.NDArray[np.float64] = np.linalg.norm(candidate.astype(np.float64) - reference, axis=1) / norms
    return np.where(np.isfinite(errors), errors, np.inf)


def worst_images(reference: Matrix, candidate: Matrix) -> list[WorstImage]:
    """Return the up to six rows with the largest relative errors, the worst first.

    There are fewer where they and their neighbours would be more than thirty images.

    Args:
        reference: the encoder's embeddings, shape (N, D), N at least 1.
        candidate: the artifact's, of the same shape.
    """
    errors = relative_errors(reference, candidate)
    finite: npt.NDArray[np.bool_] = np.all(np.isfinite(candidate), axis=1)
    truth = l2_normalized(reference.astype(np.float64))
    found = l2_normalized(np.where(finite[:, None], candidate, 0).astype(np.float64))
    worst: list[WorstImage] = []
    for row in map(int, np.argsort(-errors, kind="stable")[:_WORST]):
        image = _neighborhood(row, float(errors[row]), truth, found, finite)
        if len(shown_rows([*worst, image])) > _MOST_THUMBNAILS:
            break
        worst.append(image)
    return worst


def _neighborhood(row: int, error: float, truth: Matrix, found: Matrix, finite: npt.NDArray[np.bool_]) -> WorstImage:
    before_cosines = truth @ truth[row]
    after_cosines = np.where(finite, found @ found[row], -np.inf)
    before = _nearest(before_cosines, row)
    after = _nearest(after_cosines, row) if finite[row] else ()
    least = before_cosines[before[-1]] - _TIE if before else 0.0
    changed = frozenset(other for other in after if before_cosines[other] < least)
    return WorstImage(row=row, relative_error=error, before=before, after=after, changed=changed)


def _nearest(cosines: Matrix, row: int) -> tuple[int, ...]:
    order = [int(other) for other in np.argsort(-cosines, kind="stable") if other != row]
    return tuple(other for other in order[:_NEIGHBORS] if np.isfinite(cosines[other]))


def shown_rows(images: Iterable[WorstImage]) -> set[int]:
    """Return every row that is shown for some images."""
    return {row for image in images for row in (image.row, *image.before, *image.after)}


__all__ = ["WorstImage", "relative_errors", "shown_rows", "worst_images"]
