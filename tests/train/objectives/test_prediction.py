import pytest
import torch

from mio_export.train.objectives import PredictionLoss


def tensors(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(count)]


def test_equals_the_mean_negative_cosine_over_both_orders():
    p0, p1, z0, z1 = tensors(4)
    cosines = [torch.nn.functional.cosine_similarity(p, z).mean().item() for p, z in ((p0, z1), (p1, z0))]
    assert PredictionLoss()(p0, p1, z0, z1).item() == pytest.approx(-sum(cosines) / 2)


def test_no_gradient_flows_into_the_targets():
    p0, p1, z0, z1 = tensors(4)
    PredictionLoss()(p0, p1, z0, z1).backward()
    assert p0.grad.abs().sum() > 0
    assert p1.grad.abs().sum() > 0
    assert z0.grad is None
    assert z1.grad is None


def test_perfect_and_collapsed_look_alike():
    z = torch.randn(5, 4)
    assert PredictionLoss()(z, z, z, z).item() == pytest.approx(-1)
    point = torch.ones(5, 4)
    assert PredictionLoss()(point, point, point, point).item() == pytest.approx(-1)
    assert PredictionLoss().mutual_information(-1, num_images=5) is None
