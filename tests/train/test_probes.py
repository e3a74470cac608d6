import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from mio_export.errors import MioError
from mio_export.train.probes import chosen_strength, few_shot, fitted, linear_probe, sgd_fitted, sgd_probe, standardized


@pytest.fixture(scope="module")
def digits():
    rows, labels = load_digits(return_X_y=True)
    return rows[:1200], labels[:1200], rows[1200:], labels[1200:]


@pytest.fixture(scope="module")
def correlated():
    """256 features as an encoder gives them: not below 0, correlated, of very different spread."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(1000, 256)) / np.arange(1, 257) ** 0.5
    labels = (hidden[:, :10] + 0.3 * rng.normal(size=(1000, 10))).argmax(axis=1)
    return np.maximum(hidden @ rng.normal(size=(256, 256)), 0).astype(np.float32), labels


def gradient_norm(probe, rows, labels, strength):
    """Of mean cross-entropy plus the penalty |W|² / 2CN, written out."""
    scores = rows @ probe.coef_.T + probe.intercept_
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    shares[np.arange(len(rows)), labels] -= 1
    weights = shares.T @ rows / len(rows) + probe.coef_ / (strength * len(rows))
    return np.linalg.norm(np.concatenate([weights.ravel(), shares.mean(axis=0)]))


@pytest.mark.parametrize("name", ["digits", "correlated"])
def test_the_gradient_vanishes_where_the_probe_is(name, request):
    features, labels = request.getfixturevalue(name)[:2]
    rows, _ = standardized(features, features)
    for strength in (1e-2, chosen_strength(rows, labels), 1e2):
        assert gradient_norm(fitted(rows, labels, strength), rows, labels, strength) < 1e-6


def test_so_it_does_with_two_classes(digits):
    rows, _ = standardized(digits[0], digits[0])
    labels = np.where(digits[1] < 5, 3, 8)
    probe = fitted(rows, labels, 1.0)
    margins = rows @ probe.coef_[0] + probe.intercept_[0]
    residuals = 1 / (1 + np.exp(-margins)) - (labels == 8)
    gradient = [*(residuals @ rows / len(rows) + probe.coef_[0] / len(rows)), residuals.mean()]
    assert np.linalg.norm(gradient) < 1e-6


def test_it_goes_on_where_the_loss_has_ceased_to_fall(digits):
    rows, _ = standardized(digits[0], digits[0])  # one fit alone stops at 5.5e-8
    assert gradient_norm(fitted(rows, digits[1], 1e-2, gradient=2.5e-8), rows, digits[1], 1e-2) < 2.5e-8


def test_a_fit_that_does_not_get_there_is_refused(digits):
    with pytest.raises(MioError, match=r"does not converge \(gradient norm .*, wanted 1e-20\)"):
        fitted(digits[0] / 16, digits[1], 1.0, gradient=1e-20)


def test_one_class_is_nothing_to_probe():
    with pytest.raises(MioError, match="needs training images of two classes or more, got 1"):
        fitted(np.eye(4), np.zeros(4, np.int64), 1.0)


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


def test_the_sgd_probe_comes_near_the_convex_one_and_is_the_same_twice(digits):
    train, labels, test, test_labels = digits[0] / 16, digits[1], digits[2] / 16, digits[3]
    state = torch.random.get_rng_state()
    accuracy = sgd_probe(train, labels, test, test_labels)
    assert accuracy == pytest.approx(linear_probe(train, labels, test, test_labels), abs=0.02)
    assert sgd_probe(train, labels, test, test_labels) == accuracy
    assert torch.equal(torch.random.get_rng_state(), state)


def test_its_steps_are_those_of_torch(digits):
    rows, labels = digits[0][:100] / 16, digits[1][:100]  # the last batch is ragged
    x, y = torch.from_numpy(rows).float(), torch.from_numpy(labels)
    layer = torch.nn.Linear(64, 10)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.98)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        for batch in torch.randperm(100, generator=generator).split(32):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
    weights = sgd_fitted(rows, labels, epochs=5, learning_rate=0.01, seed=3)
    torch.testing.assert_close(weights, torch.cat([layer.weight.T, layer.bias[None]]), atol=1e-6, rtol=1e-4)


def test_the_sgd_probe_learns_by_steps_and_test_labels_decide_nothing(digits):
    train, labels, test, test_labels = digits[0] / 16, digits[1], digits[2] / 16, digits[3]
    assert sgd_probe(train, labels, test, test_labels, epochs=0) < 0.3
    assert sgd_probe(train, labels, test, test_labels, epochs=5) > 0.7
    assert sgd_probe(train, labels, test, (test_labels + 1) % 10, epochs=5) < 0.1
