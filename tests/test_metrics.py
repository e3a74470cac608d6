import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from mio_export.metrics import (
    effective_rank,
    knn_accuracy,
    l2_normalized,
    nearest,
    neighbor_agreement,
    retrieval_recall,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_nearest_is_a_full_sort_of_cosines(rng):
    queries, bank = rng.normal(size=(7, 5)), rng.normal(size=(30, 5))
    indices, cosines = nearest(queries, bank, 4)
    for row in range(7):
        expected = sorted(range(30), key=lambda i: -(queries[row] @ bank[i]) / np.linalg.norm(bank[i]))[:4]
        assert indices[row].tolist() == expected
        best = bank[expected[0]]
        expected_cosine = queries[row] @ best / np.linalg.norm(queries[row]) / np.linalg.norm(best)
        assert cosines[row, 0] == pytest.approx(expected_cosine)


def test_knn_equals_a_weighted_classifier_of_scikit_learn(rng):
    train, test = rng.normal(size=(400, 8)), rng.normal(size=(200, 8))
    labels, test_labels = rng.integers(0, 5, 400), rng.integers(0, 5, 200)
    mine = knn_accuracy(train, labels, test, test_labels, ks=(1, 20))
    for k, accuracy in mine.items():
        classifier = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.1))
        classifier.fit(train, labels)
        assert accuracy == pytest.approx(classifier.score(test, test_labels), abs=1 / 200)


def test_knn_clamps_k_to_the_bank(rng):
    rows = rng.normal(size=(6, 3))
    assert knn_accuracy(rows, np.arange(6), rows, np.arange(6), ks=(1, 200))[1] == 1.0


def test_retrieval_recall_counts_the_right_row(rng):
    bank = rng.normal(size=(50, 16))
    queries = bank.copy()
    queries[:10] = bank[10:20]  # ten queries find another row
    assert retrieval_recall(queries, bank)[1] == pytest.approx(0.8)


def test_neighbor_agreement_is_one_for_equal_and_small_for_unrelated_rows(rng):
    rows = rng.normal(size=(200, 16))
    assert neighbor_agreement(rows, rows * 3, k=10) == 1.0
    assert neighbor_agreement(rows, rng.normal(size=(200, 16)), k=10) < 0.2


def test_neighbor_agreement_is_not_fooled_by_equal_rows(rng):
    rows = np.repeat(rng.normal(size=(20, 16)), 5, axis=0)
    rounded = rows * (1 + 1e-9 * rng.normal(size=rows.shape))
    assert neighbor_agreement(rows, rounded, k=1) == 1.0
    assert neighbor_agreement(rows, rounded, k=3) == 1.0


def test_effective_rank_of_known_matrices(rng):
    assert effective_rank(np.zeros((10, 4))) == 1.0
    assert effective_rank(np.ones((10, 4))) == pytest.approx(1.0)
    assert effective_rank(np.eye(8)) == pytest.approx(8.0)
    assert 15 < effective_rank(rng.normal(size=(1000, 16))) <= 16


def test_zero_rows_stay_zero():
    assert not l2_normalized(np.zeros((2, 3))).any()
