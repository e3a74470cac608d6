import pytest
import torch

from mio_export.errors import UsageError
from mio_export.train.objectives import SpectralContrastiveLoss


def test_reaches_the_optimum_of_the_finite_oracle(finite_oracle):
    features, value = finite_oracle.train(SpectralContrastiveLoss(norm="none"), needs_target=False, num_steps=1000)
    assert finite_oracle.reaches_the_optimum(features)
    assert value == pytest.approx(-finite_oracle.optimum, rel=2e-2)  # the value leaves out i = j, an O(1/N) term


@pytest.mark.parametrize("norm", ["none", "sphere", "ball"])
def test_equals_a_double_loop(norm):
    generator = torch.Generator().manual_seed(0)
    z0, z1 = (torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(2))

    def phi(z):
        length = z.norm().item()
        radius = {"none": length, "sphere": 2**0.5, "ball": min(length, 2**0.5)}[norm]
        return z * radius / length

    attraction = sum((phi(z0[i]) @ phi(z1[i])).item() for i in range(5)) / 5
    repulsion = sum((phi(z0[i]) @ phi(z1[j])).item() ** 2 for i in range(5) for j in range(5) if i != j) / 20
    loss = SpectralContrastiveLoss(scale=2.0, norm=norm)
    assert loss(z0, z1).item() == pytest.approx(-2 * attraction + repulsion, abs=1e-12)


@pytest.mark.parametrize("norm", ["none", "sphere", "ball"])
def test_gradcheck_passes(norm):
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(5, 3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(SpectralContrastiveLoss(scale=2.0, norm=norm), pair)


def test_sentinels():
    zero = torch.zeros(16, 4, dtype=torch.float64)
    assert SpectralContrastiveLoss(norm="none")(zero, zero).item() == 0
    point = torch.ones(16, 4, dtype=torch.float64)
    assert SpectralContrastiveLoss(scale=3.0, norm="sphere")(point, point).item() == pytest.approx(9 - 6)
    assert SpectralContrastiveLoss(norm="none")(point / 2, point / 2).item() == pytest.approx(-1)


def test_a_zero_projection_has_a_finite_gradient_on_the_ball():
    z = torch.zeros(4, 3, requires_grad=True)
    SpectralContrastiveLoss()(z, torch.ones(4, 3)).backward()
    assert torch.isfinite(z.grad).all()


def test_bad_arguments_are_refused():
    with pytest.raises(UsageError, match="scale must be above 0, got -1"):
        SpectralContrastiveLoss(scale=-1)
    with pytest.raises(UsageError, match="at least 2 images"):
        SpectralContrastiveLoss()(torch.ones(1, 4), torch.ones(1, 4))
