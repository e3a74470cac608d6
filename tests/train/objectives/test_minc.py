import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mio_export.errors import UsageError
from mio_export.train.objectives import MINCLoss, SpectralContrastiveLoss


def exact_minc(loss_class=MINCLoss, *, ordered=False):
    """MINC whose second moment is the batch's own, in float64: the batch holds the whole distribution."""
    return loss_class(dim=4, norm="none", ordered=ordered, second_moment_decay=0.0)


class DifferentiatedThrough(MINCLoss):
    """The faulty form: φᵀ T φ differentiated through both factors, which symmetrises the triangle."""

    def _half(self, target, phi, moment):
        triangle = moment.tril() if self.ordered else moment
        return (-2 * (target * phi).sum(dim=1) + (phi @ triangle * phi).sum(dim=1)).sum()


class Transposed(MINCLoss):
    """The faulty form: the upper triangle instead of the lower one."""

    def _half(self, target, phi, moment):
        step = phi.detach() @ moment.triu().T
        return (-2 * (target * phi).sum(dim=1) + 2 * (step * phi).sum(dim=1)).sum()


class Centred(MINCLoss):
    """The faulty form: a covariance instead of the uncentred second moment."""

    def _update(self, targets, count):
        super()._update(targets - targets.mean(dim=0), count)


@pytest.fixture(scope="module")
def trained(finite_oracle):
    """Features and last value of each form, trained on the finite oracle: the subspace form, then the ordered one."""
    return [finite_oracle.train(exact_minc(ordered=ordered)) for ordered in (False, True)]


@pytest.mark.parametrize("ordered", [False, True])
def test_both_forms_reach_the_optimum_of_the_finite_oracle(finite_oracle, trained, ordered):
    features, value = trained[ordered]
    assert finite_oracle.reaches_the_optimum(features)
    assert value == pytest.approx(-finite_oracle.optimum, rel=1e-3)


def test_only_the_ordered_form_finds_the_eigenvectors_in_their_order(finite_oracle, trained):
    assert finite_oracle.is_ordered(trained[True][0])
    assert not finite_oracle.is_ordered(trained[False][0])


def test_the_oracle_notices_a_triangle_that_is_differentiated_through(finite_oracle):
    features, _ = finite_oracle.train(exact_minc(DifferentiatedThrough, ordered=True))
    assert 0.9 < finite_oracle.objective(features) / finite_oracle.optimum < 0.99  # it stalls, close by


def test_the_oracle_notices_a_transposed_triangle(finite_oracle):
    features, _ = finite_oracle.train(exact_minc(Transposed, ordered=True))
    assert finite_oracle.reaches_the_optimum(features)  # the right subspace
    assert not finite_oracle.is_ordered(features)
    assert finite_oracle.is_ordered(features.flip(1))  # in the reverse order


def test_the_oracle_notices_a_centred_second_moment(finite_oracle):
    features, _ = finite_oracle.train(exact_minc(Centred), num_steps=40, step=0.05)
    healthy, _ = finite_oracle.train(exact_minc(), num_steps=40, step=0.05)
    constant = finite_oracle.marginal.sqrt()
    assert (constant @ features).norm() > 3  # nothing holds the constant function back, it grows without end
    assert (constant @ healthy).norm() < 1.1


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("norm", ["none", "sphere", "ball"])
def test_value_and_gradient_are_those_of_the_definition(ordered, norm):
    generator = torch.Generator().manual_seed(0)
    online = [torch.randn(6, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]
    targets = [torch.randn(6, 4, dtype=torch.float64, generator=generator) for _ in range(2)]
    loss = MINCLoss(4, scale=3.0, norm=norm, ordered=ordered, second_moment_decay=0.5)
    loss(*online, *targets)  # a second step has a history
    value = loss(*online, *targets)
    value.backward()

    def phi(z):
        norms = z.norm(dim=1, keepdim=True)
        if norm == "sphere":
            return 3**0.5 * z / norms
        return torch.where(norms > 3**0.5, 3**0.5 * z / norms, z) if norm == "ball" else z

    moment = torch.cat([phi(t).T for t in targets], dim=1)
    moment = moment @ moment.T / 12
    triangle = moment.tril() if ordered else moment
    expected, surrogate = 0.0, 0.0
    copies = [z.detach().clone().requires_grad_() for z in online]
    for z, target in zip(copies, reversed(targets), strict=True):
        feature, goal = phi(z), phi(target)
        expected += (-2 * (goal * feature) + feature @ moment * feature).sum(dim=1).mean().item() / 2
        direction = 2 * (-goal + feature.detach() @ triangle.T)
        surrogate = surrogate + (direction * feature).sum(dim=1).mean() / 2
    surrogate.backward()
    assert value.item() == pytest.approx(expected, abs=1e-12)
    for z, copy in zip(online, copies, strict=True):
        torch.testing.assert_close(z.grad, copy.grad, rtol=0, atol=1e-12)


def test_the_second_moment_is_bias_corrected_from_the_first_step():
    z = torch.randn(32, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = []
    for decay in (0.0, 0.99):
        values.append(MINCLoss(4, norm="none", second_moment_decay=decay)(z, z, z, z).item())
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_the_second_moment_is_a_buffer_and_rests_in_eval_mode():
    loss = MINCLoss(4)
    z = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    loss(z, z, z, z)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    assert set(before) == {"second_moment", "weight", "decay"}
    loss.eval()
    loss(z, z, -z, 2 * z)
    for name, value in loss.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_bfloat16_projections_keep_a_float32_second_moment():
    loss = MINCLoss(4)
    z = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert loss(z, z, z, z).dtype == torch.float32
    assert loss.second_moment.dtype == torch.float32


def test_sentinels_without_norm():
    zero = torch.zeros(16, 4, dtype=torch.float64)
    assert exact_minc()(zero, zero, zero, zero).item() == 0
    constant = torch.zeros(16, 4, dtype=torch.float64)
    constant[:, 0] = 1
    assert exact_minc()(constant, constant, constant, constant).item() == pytest.approx(-1)


def test_sentinels_on_the_sphere():
    dim, scale = 8, 3.0
    eye = torch.eye(dim, dtype=torch.float64).repeat(4, 1)
    rolled = eye.roll(1, dims=1)

    def value(first, second):
        return MINCLoss(dim, scale=scale, second_moment_decay=0)(first, second, first, second).item()

    point = torch.ones(32, dim, dtype=torch.float64)
    assert value(point, point) == pytest.approx(scale**2 - 2 * scale)  # collapsed
    assert value(eye, eye) == pytest.approx(scale**2 / dim - 2 * scale)  # ideal
    assert value(eye, rolled) == pytest.approx(scale**2 / dim)  # independent


def test_the_value_agrees_with_the_spectral_loss_on_the_whole_distribution(finite_oracle):
    table = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pair = (table[finite_oracle.first], table[finite_oracle.second])
    spectral = SpectralContrastiveLoss(norm="none")(*pair).item()
    assert exact_minc()(*pair, *pair).item() == pytest.approx(spectral, rel=1e-2)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation gave."""

    num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def test_no_matrix_of_pairs_appears():
    z = torch.randn(512, 16, requires_grad=True)
    with LargestTensor() as minc:
        MINCLoss(16)(z, z, z, z).backward()
    with LargestTensor() as spectral:
        SpectralContrastiveLoss()(z, z).backward()
    assert minc.num_elements <= 2 * 512 * 16
    assert spectral.num_elements == 512 * 512


def test_bad_arguments_are_refused():
    with pytest.raises(UsageError, match="scale must be above 0, got 0"):
        MINCLoss(4, scale=0)
    with pytest.raises(UsageError, match="norm must be one of sphere, ball, none; got 'spere'"):
        MINCLoss(4, norm="spere")
    with pytest.raises(UsageError, match=r"second_moment_decay must be in \[0, 1\), got 1"):
        MINCLoss(4, second_moment_decay=1.0)
