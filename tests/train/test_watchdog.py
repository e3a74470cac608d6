import dataclasses

import numpy as np
import pytest
import torch

from mio_export.console.progress import Progress
from mio_export.errors import GateError
from mio_export.train import recipe_from_dict, train
from mio_export.train.objectives import MINCLoss
from mio_export.train.objectives.registry import OBJECTIVES
from mio_export.train.watchdog import Health, Watchdog, diagnosis

HEALTHY = Health(
    effective_rank=40,
    effective_rank_projections=40,
    spread=0.5,
    spread_projections=0.9,
    norm_projections=20,
    alignment=0.3,
    uniformity=-2.5,
)


class Said(Progress):
    def __init__(self):
        self.lines = []

    def line(self, text):
        self.lines.append(text)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"spread_projections": 0.05}, "constant collapse"),
        ({"spread_projections": 0.0, "effective_rank_projections": 1.0}, "constant collapse"),
        ({"effective_rank_projections": 1.5}, "dimensional collapse"),
        ({"norm_projections": 1e-6}, "zero norm"),
        ({"norm_projections": 0.0, "spread_projections": 0.0}, "zero norm"),
        ({"norm_projections": float("nan")}, "zero norm"),
    ],
)
def test_each_collapse_is_named(change, cause):
    assert diagnosis(dataclasses.replace(HEALTHY, **change), HEALTHY, output_dim=64).startswith(cause)


def test_a_healthy_encoder_gives_no_alarm():
    assert diagnosis(HEALTHY, HEALTHY, output_dim=64) is None


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """1,000 images of 8 x 8 px."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    for index, image in enumerate(load_digits().images[:1250]):
        Image.fromarray((image * 15.9).astype(np.uint8)).save(folder / f"{index:04d}.png")
    return folder


SMALL = {"epochs": 3, "batch_size": 32, "hidden_dim": 256, "output_dim": 64, "views": {"flip_probability": 0}}


class Centred(MINCLoss):
    """MINC with a covariance in place of the second moment, which makes a constant its optimum."""

    def _update(self, targets, count):
        super()._update(targets - targets.mean(dim=0), count)


@pytest.mark.parametrize(
    ("objective", "fault", "settings"),
    [
        ("byol", {"predictor": "none"}, {"target_momentum": 0.9}),
        ("minc", {"build": Centred}, {}),
    ],
    ids=["byol without its predictor", "minc with a centred second moment"],
)
def test_a_collapse_is_flagged_within_three_epochs_with_its_cause(
    digits, tmp_path, monkeypatch, objective, fault, settings
):
    monkeypatch.setitem(OBJECTIVES, objective, dataclasses.replace(OBJECTIVES[objective], **fault))
    recipe = recipe_from_dict({**SMALL, "objective": objective, "head_norm": False, **settings})
    said = Said()
    train(recipe, digits, tmp_path / "warned", progress=said)
    assert any("constant collapse" in line for line in said.lines)
    with pytest.raises(GateError, match=r"stopped in epoch \d: constant collapse"):
        train(recipe, digits, tmp_path / "stopped", on_collapse="stop")


@pytest.mark.parametrize("head_norm", [True, False])
@pytest.mark.parametrize("objective", ["mio", "minc"])
def test_healthy_training_raises_no_alarm(digits, tmp_path, objective, head_norm):
    recipe = recipe_from_dict({**SMALL, "objective": objective, "head_norm": head_norm})
    result = train(recipe, digits, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert lines.count('"alarm": null') == 3, lines
    assert result.metrics["spread_projections"] > 0.3


def test_looking_changes_nothing(digits, tmp_path):
    from mio_export.train.cost import build_module, contract

    recipe = recipe_from_dict(
        {**SMALL, "objective": "minc", "image_size": 8, "channels": 1, "backbone": "small", "stem": "small"}
    )
    module = build_module(recipe, contract(recipe), num_batches=1).train()
    clean = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1), dtype=np.uint8)
    module.objective(*[torch.randn(8, 64) for _ in range(4)])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    watchdog = Watchdog(clean, module.objective.monitor())
    watchdog.start(module)
    watchdog.look(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(part.training for part in module.modules())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("objective", ["mio", "minc"])
def test_five_seeds_of_the_default_recipe_raise_no_alarm(digits, tmp_path, objective, seed):
    settings = {"objective": objective, "seed": seed, "epochs": 6, "batch_size": 64, "views": {"flip_probability": 0}}
    train(recipe_from_dict(settings), digits, tmp_path / "run", on_collapse="stop")
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"alarm": null') == 6
