import numpy as np
import pytest
from sklearn.datasets import load_digits

from mio_export.train.probes import few_shot, fitted, linear_probe


@pytest.fixture(scope="module")
def digits():
    rows, labels = load_digits(return_X_y=True)
    return rows[:1200], labels[:1200], rows[1200:], labels[1200:]


def test_the_probe_is_where_the_gradient_vanishes(digits):
    rows, labels = digits[0] / 16, digits[1]
    probe = fitted(rows, labels, 1.0, gradient=1e-7)
    scores = rows @ probe.coef_.T + probe.intercept_
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    shares[np.arange(len(rows)), labels] -= 1
    gradient = np.concatenate([(shares.T @ rows / len(rows) + probe.coef_ / len(rows)).ravel(), shares.mean(axis=0)])
    assert np.linalg.norm(gradient) < 1e-6


def test_it_reads_digits_and_is_the_same_twice(digits):
    accuracy = linear_probe(*digits)
    assert accuracy > 0.9
    assert linear_probe(*digits) == accuracy


def test_test_labels_decide_nothing_but_the_score(digits):
    train, labels, test, test_labels = digits
    wrong = (test_labels + 1) % 10
    assert linear_probe(train, labels, test, wrong) < 0.1


def test_scale_and_shift_of_a_feature_do_not_matter(digits):
    train, labels, test, test_labels = digits
    moved = linear_probe(train * 1000 + 7, labels, test * 1000 + 7, test_labels)
    assert moved == pytest.approx(linear_probe(*digits), abs=0.005)


def test_more_shots_do_better(digits):
    accuracies = few_shot(*digits)
    assert list(accuracies) == [1, 5, 10]
    assert 0.3 < accuracies[1] < accuracies[5] < accuracies[10] < linear_probe(*digits)
