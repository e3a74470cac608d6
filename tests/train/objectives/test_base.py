import pytest
import torch

from mio_export.train.objectives import Monitor, Objective
from mio_export.train.objectives.registry import OBJECTIVES, build_objective, monitored_quantities


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_keeps_the_contract(name):
    objective = build_objective(name, output_dim=8, arguments={})
    spec, z = OBJECTIVES[name], torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    loss = objective(*(z[:2] if spec.target == "none" else z))
    assert loss.shape == ()
    estimate = objective.mutual_information(loss.item(), num_images=6)
    assert (estimate is None) == (objective.information is None)
    assert objective.monitor().measure(torch.cat([z[0], z[1]])).keys() == objective.monitored.keys()
    assert not objective.ordered


def test_the_order_of_projections_is_the_objectives_own_word():
    assert build_objective("minc", output_dim=8, arguments={"ordered": True}).ordered


def test_only_minc_is_monitored():
    assert list(monitored_quantities()) == ["second_moment_lag"]


def test_forward_is_all_that_a_new_objective_must_define():
    class Hinge(Objective):
        def forward(self, projections_0, projections_1):
            return (1 - torch.cosine_similarity(projections_0, projections_1)).clamp_min(0).mean()

    with pytest.raises(TypeError, match="forward"):
        Objective()
    objective = Hinge()
    assert objective(torch.eye(3), torch.eye(3).roll(1, 0)) == 1
    assert type(objective.monitor()) is Monitor
    assert objective.mutual_information(1.0, num_images=3) is None
