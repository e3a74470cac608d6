"""Linear probes on frozen features: convex, so that they have one answer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int64]

_STRENGTHS = tuple(10.0**power for power in range(-4, 3))
_HELD_OUT_OF = 10
_GRADIENT = 1e-7
_FEW_SHOT_DRAWS = 10


def linear_probe(train: Matrix, train_labels: Labels, test: Matrix, test_labels: Labels) -> float:
    """Return the test accuracy of L-BFGS logistic regression on standardised features.

    The strength C is chosen on a held-out tenth of the training rows, never on the test rows; the probe is then fitted
    on all training rows until the gradient is below 1e-7.

    Args:
        train: shape (N, D).
        train_labels: shape (N,).
        test: shape (M, D).
        test_labels: shape (M,).
    """
    train, test = _standardized(train, test)
    held_out = np.arange(len(train)) % _HELD_OUT_OF == 0
    fit, check = (train[~held_out], train_labels[~held_out]), (train[held_out], train_labels[held_out])
    best = max(_STRENGTHS, key=lambda strength: (fitted(*fit, strength, gradient=1e-4).score(*check), -strength))
    return float(fitted(train, train_labels, best, gradient=_GRADIENT).score(test, test_labels))


def few_shot(
    train: Matrix, train_labels: Labels, test: Matrix, test_labels: Labels, *, shots: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """Return the mean test accuracy of probes on 1, 5 and 10 training rows of each class, over ten fixed draws."""
    train, test = _standardized(train, test)
    classes = np.unique(train_labels)
    accuracies = {}
    for shot in shots:
        scores = []
        for draw in range(_FEW_SHOT_DRAWS):
            rng = np.random.default_rng(draw)
            members = (np.flatnonzero(train_labels == label) for label in classes)
            chosen = np.concatenate([rng.permutation(rows)[:shot] for rows in members])
            scores.append(fitted(train[chosen], train_labels[chosen], 1.0, gradient=1e-4).score(test, test_labels))
        accuracies[shot] = float(np.mean(scores))
    return accuracies


def fitted(rows: Matrix, labels: Labels, strength: float, *, gradient: float) -> Any:
    """Return scikit-learn's logistic regression, fitted until its largest gradient entry is below ``gradient``."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, tol=gradient, max_iter=10_000).fit(rows, labels)


def _standardized(train: Matrix, test: Matrix) -> tuple[Matrix, Matrix]:
    """Shift and scale both by the training rows' mean and deviation, in float64; constant columns become zero."""
    mean, deviation = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    scale = np.where(deviation > 0, deviation, 1)
    return (train - mean) / scale, (test - mean) / scale
