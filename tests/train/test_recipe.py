import re

import pytest

from mio_export.errors import UsageError
from mio_export.settings import with_settings
from mio_export.train.objectives.registry import OBJECTIVES, build_objective
from mio_export.train.recipe import Recipe, recipe_from_dict


def test_settings_reach_every_field():
    settings = ["epochs=3", "loss.temperature=0.1", "loss.block_size=64", "views.crop_area=0.5,1", "precision=fp32"]
    recipe = recipe_from_dict(with_settings({"objective": "mio"}, settings))
    assert recipe.epochs == 3
    assert recipe.loss == {"temperature": 0.1, "block_size": 64}
    assert isinstance(recipe.loss["block_size"], int)
    assert recipe.views.crop_area == (0.5, 1.0)
    assert recipe_from_dict(recipe.to_dict()) == recipe


def test_a_preset_of_views_fills_in_what_is_not_set():
    recipe = recipe_from_dict(with_settings({"views": {"preset": "byol"}}, ["views.flip_probability=0"]))
    assert recipe.views.preset == "byol"
    assert recipe.views.blur_probability == (1.0, 0.1)
    assert recipe.views.flip_probability == 0
    assert recipe_from_dict(recipe.to_dict()) == recipe  # a stored recipe holds every value


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("epoch=3", "unknown setting 'epoch'; did you mean epochs?"),
        ("views.crop_aera=0.5,1", "unknown setting 'views.crop_aera'; did you mean views.crop_area?"),
        ("epochs=0", "recipe: epochs must be above 0, got 0"),
        ("epochs=many", "epochs"),
        (
            "objective=dino",
            "recipe: objective must be one of mio, minc, spectral, simclr, byol, linear-byol, simsiam; got 'dino'",
        ),
        ("views.crop_area=0,1", "views: crop_area must be a range in (0, 1], got (0.0, 1.0)"),
        ("views.preset=dino", "views: preset must be one of gentle, mio, simclr, byol; got 'dino'"),
        ("views=byol", "views: Input should be a dictionary"),
        ("image_size=4", "image_size must be 8 or more, got 4"),
        ("warmup_share=1", "warmup_share must be in [0, 1), got 1"),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        recipe_from_dict(with_settings({}, [setting]))


@pytest.mark.parametrize("setting", ["epochs", "=3", "objective.x=1"])
def test_what_is_no_setting_is_refused(setting):
    with pytest.raises(UsageError, match=r"KEY=VALUE|holds no settings"):
        with_settings({"objective": "mio"}, [setting])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_built_by_name_and_refuses_unknown_arguments(name):
    build_objective(name, output_dim=8, arguments={})
    with pytest.raises(UsageError, match=f"objective {name}: .*nonsense"):
        build_objective(name, output_dim=8, arguments={"nonsense": 1})


def test_every_objective_can_be_named_in_a_recipe():
    assert {recipe_from_dict({"objective": name}).objective for name in OBJECTIVES} == set(OBJECTIVES)
    assert Recipe().objective in OBJECTIVES
