from itertools import pairwise

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from mio_export.train.optimizers import build_optimizer, build_schedule
from mio_export.train.recipe import recipe_from_dict


def rates(num_steps, **settings):
    """The rate of each step."""
    recipe = recipe_from_dict({"learning_rate": 1.0, **settings})
    optimizer = build_optimizer([nn.Linear(2, 2)], recipe)
    schedule = build_schedule(optimizer, recipe, num_steps=num_steps)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_batch_norm_and_biases_have_no_decay_those_of_shortcuts_included(name):
    model = resnet18()
    optimizer = build_optimizer([model], recipe_from_dict({"optimizer": name, "weight_decay": 0.01}))
    decayed, plain = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            exempt = isinstance(module, nn.BatchNorm2d) or key == "bias"
            assert (id(parameter) in plain) == exempt, path
            assert (id(parameter) in decayed) != exempt, path
    assert id(model.layer2[0].downsample[1].weight) in plain


def test_lars_scales_by_layer_and_takes_plain_steps_elsewhere():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    recipe = recipe_from_dict({"optimizer": "lars", "learning_rate": 0.5, "weight_decay": 1e-6, "momentum": 0.9})
    build_optimizer([model], recipe).step()
    weight = before["0.weight"]
    trust = 1e-3 * weight.norm() / (torch.full((3, 3), 2.0).norm() + 1e-6 * weight.norm())
    expected = weight - 0.5 * trust * (2.0 + 1e-6 * weight)
    torch.testing.assert_close(model[0].weight.detach(), expected)
    torch.testing.assert_close(model[1].weight.detach(), before["1.weight"] - 0.5 * 2.0)


def test_the_rate_rises_then_falls_on_a_cosine_to_its_floor():
    found = rates(100, epochs=10, warmup_share=0.1, floor_learning_rate=0.1)
    assert found[0] == pytest.approx(0.1 + 0.9 / 10)
    assert max(found) == pytest.approx(1.0)
    assert found.index(max(found)) in (9, 10)
    assert found[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(found[10:]))


def test_a_cosine_laid_out_longer_ends_high():
    found = rates(250, epochs=250, schedule_epochs=1000, warmup_share=0.04)
    assert 0.84 < found[-1] < 0.88  # the authors of MIO stop at 86 % of the peak
