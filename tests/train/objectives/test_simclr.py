import math

import pytest
import torch

from mio_export.errors import UsageError
from mio_export.train.objectives import SimCLRLoss


def test_equals_a_double_loop():
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(4, 6, dtype=torch.float64, generator=generator) for _ in range(2)]
    views = torch.nn.functional.normalize(torch.cat(pair), dim=1)
    expected = 0.0
    for i in range(8):
        partner = (i + 4) % 8
        logits = [(views[i] @ views[j]).item() / 0.3 for j in range(8) if j != i]
        expected += math.log(sum(math.exp(logit) for logit in logits)) - (views[i] @ views[partner]).item() / 0.3
    assert SimCLRLoss(0.3)(*pair).item() == pytest.approx(expected / 8, rel=1e-6)


def test_the_bound_is_zero_for_chance_and_at_most_the_log_of_the_choices():
    point = torch.ones(8, 4)
    assert SimCLRLoss().mutual_information(SimCLRLoss()(point, point).item(), num_images=8) == pytest.approx(
        0, abs=1e-5
    )
    perfect = SimCLRLoss(0.01)(torch.eye(8), torch.eye(8)).item()
    assert SimCLRLoss().mutual_information(perfect, num_images=8) == pytest.approx(math.log(15), abs=1e-4)


def test_bad_arguments_are_refused():
    with pytest.raises(UsageError, match="temperature must be above 0, got 0"):
        SimCLRLoss(0)
    with pytest.raises(UsageError, match="at least 2 images"):
        SimCLRLoss()(torch.ones(1, 4), torch.ones(1, 4))
