"""Measures of embeddings, in NumPy: nearest neighbours, retrieval, and the rank of a feature matrix."""

from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int64]
_BLOCK = 1024
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
        order = np.argsort(-block, axis=1, kind="stable")[:, :k]
        indices[start : start + _BLOCK] = order
        cosines[start : start + _BLOCK] = np.take_along_axis(block, order, axis=1)
    return indices, cosines


def knn_accuracy(
    train: Matrix, train_labels: Labels, test: Matrix, test_labels: Labels, *, ks: tuple[int, ...] = (1, 5, 10, 20, 200)
) -> dict[int, float]:
    """Return the accuracy of a cosine kNN classifier, votes weighted by exp(cosine / 0.1), for each k.

    Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4, with the temperature 0.1 that the field uses.
    """
    indices, cosines = nearest(test, train, max(ks))
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    weights = np.exp(cosines.astype(np.float64) / 0.1)
    accuracies = {}
    for k in ks:
        votes = np.zeros((len(test), num_classes))
        rows = np.arange(len(test))[:, None]
        np.add.at(votes, (rows, train_labels[indices[:, :k]]), weights[:, :k])
        accuracies[k] = float((votes.argmax(axis=1) == test_labels).mean())
    return accuracies


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
    """Return the singular values of a feature matrix, descending, the largest divided to 1; shape (min(N, D),).

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


__all__ = [
    "HEADLINE_K",
    "effective_rank",
    "knn_accuracy",
    "l2_normalized",
    "nearest",
    "neighbor_agreement",
    "retrieval_recall",
    "spectrum",
]
