import math

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from mio_export.errors import UsageError
from mio_export.metrics import (
    effective_rank,
    knn_accuracy,
    knn_predictions,
    l2_normalized,
    nearest,
    neighbor_agreement,
    paired_bootstrap,
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


def knn_by_hand(train, labels, query, ks):
    """The definition, one number at a time in float64; equal cosines by index, equal votes by class."""
    cosines = []
    for row in train.tolist():
        dot = sum(a * b for a, b in zip(query.tolist(), row, strict=True))
        norms = sum(a * a for a in query.tolist()) ** 0.5 * sum(b * b for b in row) ** 0.5
        cosines.append(dot / norms if norms else 0.0)
    order = sorted(range(len(train)), key=lambda i: (-cosines[i], i))
    for k in ks:
        votes = [0.0] * (max(labels) + 1)
        for i in order[:k]:
            votes[labels[i]] += math.exp(cosines[i] / 0.1)
        yield votes.index(max(votes))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_knn_equals_a_double_loop_in_float64_to_one_sample(rng, dtype):
    ks = (1, 5, 20, 200)
    train = rng.normal(size=(120, 6)).astype(dtype)
    train[60:90] = train[:30]  # equal rows of other classes
    train[90] = 0
    labels = rng.integers(0, 4, 120)
    test = np.concatenate([rng.normal(size=(90, 6)).astype(dtype), train[:30] * 2])
    expected = np.array([list(knn_by_hand(train, labels.tolist(), query, ks)) for query in test])
    for column, (k, classes) in enumerate(knn_predictions(train, labels, test, ks=ks).items()):
        assert classes.dtype == np.int64
        assert (classes != expected[:, column]).sum() <= 1, k


def test_a_class_that_only_the_test_set_has_is_never_predicted(rng):
    train, test = rng.normal(size=(20, 3)), rng.normal(size=(10, 3))
    assert set(knn_accuracy(train, np.arange(20) % 2, test, np.full(10, 7)).values()) == {0.0}


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


def two_systems(rng, num_seeds, num_images, share_a, share_b):
    """Each is right on its share of the images; in each seed, one answer in twenty turns out otherwise."""
    for share in (share_a, share_b):
        right = rng.random(num_images) < share
        yield right ^ (rng.random((num_seeds, num_images)) < 0.05)


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_the_interval_covers_a_known_difference(rng, num_seeds):
    covered = 0
    for repetition in range(200):
        a, b = two_systems(rng, num_seeds, 400, 0.7, 0.6)
        interval = paired_bootstrap(a, b, num_resamples=1_000, seed=repetition)
        covered += interval.low <= 0.9 * 0.1 <= interval.high
    assert 0.9 <= covered / 200 <= 0.99


def test_seeds_are_resampled_too(rng):
    a = np.repeat([[True], [False], [True]], 1_000, axis=1)  # a seed decides everything, images nothing
    interval = paired_bootstrap(a, np.zeros_like(a))
    assert interval.difference == pytest.approx(2 / 3)
    assert interval.low <= 1 / 3
    assert interval.high == 1.0


def test_it_is_what_drawing_image_by_image_and_seed_by_seed_gives(rng):
    a, b = two_systems(rng, 4, 200, 0.7, 0.6)
    differences = a.astype(float) - b
    draws = [differences[rng.integers(0, 4, 4)][:, rng.integers(0, 200, 200)].mean() for _ in range(10_000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    interval = paired_bootstrap(a, b)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.006)


def test_equal_systems_have_an_interval_of_no_width(rng):
    a, _ = two_systems(rng, 3, 500, 0.7, 0.6)
    interval = paired_bootstrap(a, a)
    assert (interval.difference, interval.low, interval.high) == (0, 0, 0)


def test_a_plain_difference_excludes_zero_and_its_sign_turns(rng):
    a, b = two_systems(rng, 3, 2_000, 0.75, 0.6)
    assert paired_bootstrap(a, b).low > 0.1
    assert paired_bootstrap(b, a).high < -0.1
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b)


def test_systems_on_other_images_cannot_be_compared():
    with pytest.raises(UsageError, match=r"got \(1, 5\) and \(1, 6\)"):
        paired_bootstrap(np.zeros((1, 5), bool), np.zeros((1, 6), bool))
