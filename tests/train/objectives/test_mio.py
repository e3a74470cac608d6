import json
import math
from pathlib import Path

import pytest
import torch

from mio_export.errors import UsageError
from mio_export.train.objectives import MIOLoss

CASES = json.loads((Path(__file__).parents[2] / "oracles" / "mio.json").read_text())["cases"]


def double(values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def random_pair(num_images, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(num_images, dim, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)
    )


def loss_and_gradients(loss, pair):
    pair = [z.detach().clone().requires_grad_() for z in pair]
    value = loss(*pair)
    value.backward()
    return value.item(), torch.cat([z.grad for z in pair])


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize("block_size", [512, 3])
def test_loss_and_gradients_equal_the_authors_own_code(case, block_size):
    z0, z1 = double(case["projections_0"]), double(case["projections_1"])
    loss = MIOLoss(
        case["temperature"], case["negative_temperature"], regularizer=case["regularizer"], block_size=block_size
    )
    value = loss(z0, z1)
    value.backward()
    assert abs(value.item() - case["loss"]) < 1e-10
    torch.testing.assert_close(z0.grad, torch.tensor(case["grad_0"], dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(z1.grad, torch.tensor(case["grad_1"], dtype=torch.float64), rtol=0, atol=1e-10)


def test_equals_a_double_loop_over_all_pairs():
    z0, z1 = random_pair(5, 7)
    views = torch.nn.functional.normalize(torch.cat([z0, z1]), dim=1)
    positives, negatives = [], []
    for i in range(10):
        for j in range(10):
            if i != j:
                (positives if abs(i - j) == 5 else negatives).append((views[i] @ views[j]).item())
    expected = sum(math.log1p(math.exp(-s / 0.3)) for s in positives) / len(positives)
    expected += sum(math.log1p(math.exp(s / 0.7)) for s in negatives) / len(negatives)
    expected += 2.5 * (views[:5] - views[5:]).square().mean().item()
    assert len(negatives) == 10 * 8
    assert MIOLoss(0.3, 0.7, regularizer=2.5)(z0, z1).item() == pytest.approx(expected, abs=1e-12)


def test_a_permuted_batch_has_the_same_loss():
    z0, z1 = random_pair(16, 8)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert MIOLoss()(z0[order], z1[order]).item() == pytest.approx(MIOLoss()(z0, z1).item(), abs=1e-12)


@pytest.mark.parametrize("block_size", [512, 4])
def test_gradcheck_passes(block_size):
    assert torch.autograd.gradcheck(MIOLoss(block_size=block_size), random_pair(5, 6))


def test_the_blocked_form_has_the_same_gradient_in_float32():
    pair = [z.detach().float() for z in random_pair(300, 32)]
    whole, blocked = (loss_and_gradients(MIOLoss(block_size=size), pair) for size in (600, 64))
    assert blocked[0] == pytest.approx(whole[0], rel=1e-6)
    assert (blocked[1] - whole[1]).norm() <= 1e-6 * whole[1].norm()


def test_sentinels():
    loss = MIOLoss(regularizer=0)
    eye = torch.eye(64, dtype=torch.float64)
    assert loss(eye[:32], eye[32:]).item() == pytest.approx(2 * math.log(2), abs=1e-9)  # all cosines zero
    point = torch.ones(32, 8, dtype=torch.float64)
    assert loss(point, point).item() == pytest.approx(2.254, abs=1e-3)  # collapsed
    assert loss(eye, eye).item() == pytest.approx(0.820, abs=1e-3)  # perfect positives, orthogonal negatives


def test_mutual_information_is_zero_where_nothing_is_learned():
    assert MIOLoss().mutual_information(2 * math.log(2), num_images=8) == pytest.approx(0)


def test_bad_arguments_are_refused():
    with pytest.raises(UsageError, match="temperatures must be above 0, got 0"):
        MIOLoss(0)
    with pytest.raises(UsageError, match="regularizer must be 0 or more, got -1"):
        MIOLoss(regularizer=-1)
    with pytest.raises(UsageError, match="at least 2 images"):
        MIOLoss()(torch.ones(1, 4), torch.ones(1, 4))
