"""Measures of embeddings, in NumPy: nearest neighbours, retrieval, rank, and how sure a difference is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mio_export.errors import UsageError

Matrix = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int64]
Correct = npt.NDArray[np.bool_]
_BLOCK = 1024
_RESAMPLES = 256
KNN_KS = (1, 5, 10, 20, 200)
HEADLINE_K = 20
"""The k of kNN that tables show; results hold the others too."""


def l2_normalized(rows: Matrix) -> Matrix:
    """Return rows divided by their L2 norm; zero rows stay zero. Shape (N, D)."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def nearest(queries: Matrix, bank: Matrix, k: int) -> tuple[npt.NDArray[np.int64], Matrix]:
    """Find the k rows of ``bank`` with the highest cosine for each query, the most similar first.

    Equal cosines are ordered by index. ``k`` is clamped to the bank's size.

    Args:
        queries: shape (Q, D).
        bank: shape (N, D).
        k: number of neighbours.

    Returns:
        Indices (Q, k) and cosines (Q, k).
    """
    k = min(k, len(bank))
    queries, bank = l2_normalized(queries), l2_normalized(bank)
    indices = np.empty((len(queries), k), dtype=np.int64)
    cosines = np.empty((len(queries), k), dtype=queries.dtype)
    for start in range(0, len(queries), _BLOCK):
        block = queries[start : start + _BLOCK] @ bank.T
        order = _largest(block, k)
        indices[start : start + _BLOCK] = order
        cosines[start : start + _BLOCK] = np.take_along_axis(block, order, axis=1)
    return indices, cosines


def _largest(rows: Matrix, k: int) -> npt.NDArray[np.int64]:
    """Indices of each row's k largest values, the largest first and equal ones by index; shape (Q, k).

    Only the k largest are sorted, which is several times faster than sorting whole rows; where the k-th value occurs
    beyond them too, which of the equal ones count is settled by sorting that row.
    """
    chosen = np.sort(np.argpartition(-rows, k - 1, axis=1)[:, :k], axis=1)
    values = np.take_along_axis(rows, chosen, axis=1)
    order: npt.NDArray[np.int64] = np.take_along_axis(chosen, np.argsort(-values, axis=1, kind="stable"), axis=1)
    smallest = values.min(axis=1, keepdims=True)
    for row in np.flatnonzero((rows == smallest).sum(axis=1) > (values == smallest).sum(axis=1)):
        order[row] = np.argsort(-rows[row], kind="stable")[:k]
    return order


def knn_predictions(
    train: Matrix, train_labels: Labels, test: Matrix, *, ks: Sequence[int] = KNN_KS
) -> dict[int, Labels]:
    """Return the classes that a cosine kNN classifier gives, votes weighted by exp(cosine / 0.1), for each k.

    k is clamped to the bank's size; of classes with equal votes the first counts.

    Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4, with the temperature 0.1 that the field uses.

    Args:
        train: the bank, shape (N, D).
        train_labels: shape (N,).
        test: shape (M, D).
        ks: numbers of neighbours.

    Returns:
        Classes, int64, shape (M,), for each k.
    """
    indices, cosines = nearest(test, train, max(ks))
    weights = np.exp(cosines.astype(np.float64) / 0.1)
    rows = np.arange(len(test))[:, None]
    predictions = {}
    for k in ks:
        votes = np.zeros((len(test), int(train_labels.max()) + 1))
        np.add.at(votes, (rows, train_labels[indices[:, :k]]), weights[:, :k])
        predictions[k] = votes.argmax(axis=1)
    return predictions


def knn_accuracy(
    train: Matrix, train_labels: Labels, test: Matrix, test_labels: Labels, *, ks: Sequence[int] = KNN_KS
) -> dict[int, float]:
    """Return the accuracy of ``knn_predictions`` for each k."""
    predictions = knn_predictions(train, train_labels, test, ks=ks)
    return {k: float((classes == test_labels).mean()) for k, classes in predictions.items()}


def leave_one_out_accuracy(rows: Matrix, labels: Labels, *, k: int = HEADLINE_K) -> float:
    """Return the accuracy of a cosine kNN that names each row by its k nearest other rows, all votes equal.

    Args:
        rows: shape (N, D), N ≥ 2.
        labels: shape (N,).
        k: number of neighbours, clamped to N - 1.
    """
    indices, _ = nearest(rows, rows, k + 1)
    own = np.arange(len(rows))[:, None]
    # of equal rows, the row itself need not come first; if it is not among the nearest, the last one goes
    others = np.where((indices == own).any(axis=1, keepdims=True), indices == own, np.arange(indices.shape[1]) == k)
    neighbors = labels[indices[~others].reshape(len(rows), -1)]
    votes = (neighbors[:, :, None] == np.unique(labels)).sum(axis=1)
    return float((np.unique(labels)[votes.argmax(axis=1)] == labels).mean())


def retrieval_recall(queries: Matrix, bank: Matrix, *, ks: tuple[int, ...] = (1, 10)) -> dict[int, float]:
    """Return the share of queries i whose k nearest rows of ``bank`` hold row i, for each k."""
    indices, _ = nearest(queries, bank, max(ks))
    wanted = np.arange(len(queries))[:, None]
    return {k: float((indices[:, :k] == wanted).any(axis=1).mean()) for k in ks}


def neighbor_agreement(reference: Matrix, candidate: Matrix, *, k: int) -> float:
    """Return the mean share of each row's k nearest other rows in ``candidate`` that are nearest in ``reference`` too.

    A neighbour counts if its cosine in ``reference`` reaches that of the k-th nearest there, less 1e-6: among equal
    images, which one comes first is a matter of rounding.
    """
    k = min(k, len(reference) - 1)
    reference, candidate = l2_normalized(reference), l2_normalized(candidate)
    shares = []
    for start in range(0, len(reference), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(reference)))
        truth, found = reference[rows] @ reference.T, candidate[rows] @ candidate.T
        truth[rows - start, rows] = found[rows - start, rows] = -np.inf
        threshold = np.partition(truth, -k, axis=1)[:, -k]
        chosen = np.argpartition(found, -k, axis=1)[:, -k:]
        shares.append(np.take_along_axis(truth, chosen, axis=1) >= threshold[:, None] - 1e-6)
    return float(np.concatenate(shares).mean())


def spectrum(rows: Matrix) -> npt.NDArray[np.float64]:
    """Return the singular values of a feature matrix, descending, scaled so that the largest is 1; shape (min(N, D),).

    The mean is not removed. All are 0 for zero rows.
    """
    singular_values = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
    return singular_values / singular_values[0] if singular_values[0] > 0 else singular_values


def effective_rank(rows: Matrix) -> float:
    """Return RankMe: the exponential of the entropy of the normalised singular values.

    1 for constant and for zero rows, at most min(N, D).

    Source: Garrido et al. 2023, "RankMe" (arXiv 2210.02885), equation 1.
    """
    singular_values = spectrum(rows)
    total = singular_values.sum()
    if not total > 0:
        return 1.0
    p = singular_values[singular_values > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


@dataclass(frozen=True, kw_only=True)
class BootstrapInterval:
    """A difference between two systems, and how sure it is."""

    difference: float
    """Mean of the first less mean of the second."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""


def paired_bootstrap(
    correct_a: Correct,
    correct_b: Correct,
    *,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> BootstrapInterval:
    """Return the accuracy of system a less that of system b, with a percentile interval.

    Each resample draws images with replacement, the same for both systems and for all seeds, and seeds, the same for
    both systems. With one seed the interval speaks of the images alone.

    Once a resample's seeds are drawn, an image counts only by the sum of its differences over them, one of a few whole
    numbers; how often each is drawn is multinomial. That is the same distribution as drawing image by image.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13; two factors resampled
    independently, which errs to the wide side: Owen 2007, "The pigeonhole bootstrap" (arXiv 0712.1111).

    Args:
        correct_a: which seed of system a was right on which test image, shape (num_seeds, num_images).
        correct_b: the same of system b.
        num_resamples: how many resamples to draw.
        confidence: share of resamples that lie inside the interval.
        seed: seed of the draws.

    Raises:
        UsageError: the two have other shapes, or there is nothing to compare.
    """
    if correct_a.shape != correct_b.shape or correct_a.ndim != 2 or not correct_a.size:
        raise UsageError(f"two equal shapes (seeds, images) are needed, got {correct_a.shape} and {correct_b.shape}")
    differences = correct_a.astype(np.int8) - correct_b.astype(np.int8)
    num_seeds, num_images = differences.shape
    kinds, counts = np.unique(differences, axis=1, return_counts=True)
    values = np.arange(-num_seeds, num_seeds + 1)
    rng = np.random.default_rng(seed)
    sums = []
    for size in np.diff([*range(0, num_resamples, _RESAMPLES), num_resamples]):
        seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=size)
        cells = (seeds.astype(np.float64) @ kinds).astype(np.int64) + num_seeds + len(values) * np.arange(size)[:, None]
        histogram = np.bincount(cells.ravel(), np.tile(counts, size), minlength=len(values) * size)
        sums.append(rng.multinomial(num_images, histogram.reshape(size, -1) / num_images) @ values)
    low, high = np.quantile(np.concatenate(sums) / differences.size, [(1 - confidence) / 2, (1 + confidence) / 2])
    return BootstrapInterval(difference=float(differences.mean()), low=float(low), high=float(high))


__all__ = [
    "HEADLINE_K",
    "KNN_KS",
    "BootstrapInterval",
    "effective_rank",
    "knn_accuracy",
    "knn_predictions",
    "l2_normalized",
    "leave_one_out_accuracy",
    "nearest",
    "neighbor_agreement",
    "paired_bootstrap",
    "retrieval_recall",
    "spectrum",
]
