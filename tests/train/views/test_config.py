import re

import pytest

from mio_export.errors import UsageError
from mio_export.train.views import PRESETS, ViewConfig, view_values, view_warnings

PUBLISHED = {
    "gentle": {
        "crop_area": (0.4, 1.0),
        "jitter": (0.4, 0.4, 0.4, 0.1, 0.4),
        "blur_probability": (0.0, 0.0),
        "solarize_probability": (0.0, 0.0),
    },
    "mio": {
        "crop_area": (0.8, 1.0),
        "jitter": (0.4, 0.4, 0.4, 0.1, 0.8),
        "blur_probability": (0.5, 0.5),
        "solarize_probability": (0.2, 0.2),
    },
    "simclr": {
        "crop_area": (0.08, 1.0),
        "jitter": (0.8, 0.8, 0.8, 0.2, 0.8),
        "blur_probability": (0.5, 0.5),
        "solarize_probability": (0.0, 0.0),
    },
    "byol": {
        "crop_area": (0.08, 1.0),
        "jitter": (0.4, 0.4, 0.2, 0.1, 0.8),
        "blur_probability": (1.0, 0.1),
        "solarize_probability": (0.0, 0.2),
    },
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_has_the_published_values(preset):
    config = ViewConfig(**view_values({"preset": preset}))
    assert {
        "crop_area": config.crop_area,
        "jitter": (config.brightness, config.contrast, config.saturation, config.hue, config.jitter_probability),
        "blur_probability": config.blur_probability,
        "solarize_probability": config.solarize_probability,
    } == PUBLISHED[preset]
    assert (config.preset, config.crop_aspect) == (preset, (3 / 4, 4 / 3))
    assert (config.flip_probability, config.grayscale_probability) == (0.5, 0.2)
    assert (config.blur_sigma, config.solarize_threshold) == ((0.1, 2.0), 128)


def test_the_defaults_are_the_gentle_preset():
    assert ViewConfig() == ViewConfig(**view_values({})) == ViewConfig(**view_values({"preset": "gentle"}))
    assert set(PRESETS) == set(PUBLISHED)


def test_given_values_win_over_the_presets():
    config = ViewConfig(**view_values({"preset": "byol", "flip_probability": 0, "crop_area": (0.5, 1.0)}))
    assert (config.flip_probability, config.crop_area, config.blur_probability) == (0, (0.5, 1.0), (1.0, 0.1))


@pytest.mark.parametrize("preset", ["dino", ["byol"], None])
def test_an_unknown_preset_is_refused_and_the_four_are_named(preset):
    message = f"views: preset must be one of gentle, mio, simclr, byol; got {preset!r}"
    with pytest.raises(UsageError, match=re.escape(message)):
        view_values({"preset": preset})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "dino"}, "preset must be one of gentle, mio, simclr, byol; got 'dino'"),
        ({"blur_probability": (0.5, 1.5)}, "blur_probability must be two numbers of 0 to 1"),
        ({"solarize_probability": (-0.1, 0)}, "solarize_probability must be two numbers of 0 to 1"),
        ({"blur_sigma": (0.0, 2.0)}, "blur_sigma must be a range above 0, got (0.0, 2.0)"),
        ({"blur_sigma": (2.0, 1.0)}, "blur_sigma must be a range above 0, got (2.0, 1.0)"),
        ({"solarize_threshold": 256}, "solarize_threshold must be 0 to 255, got 256"),
        ({"contrast": -1}, "contrast must be 0 or more, got -1"),
        ({"flip_probability": 2}, "flip_probability must be 0 to 1, got 2"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(UsageError, match=re.escape(f"views: {message}")):
        ViewConfig(**values)


@pytest.mark.parametrize(
    "names",
    [
        [str(digit) for digit in range(10)],
        ["A", "b", "C"],
        ["zero", "One", "nine"],
        ["0 - zero", "1 - one"],
        ["3_three", "5-five"],
    ],
)
def test_flips_of_digits_and_letters_are_warned_of(names):
    [line] = view_warnings(ViewConfig(), names)
    assert f"({', '.join(names[:3])}" in line
    assert "--set views.flip_probability=0" in line
    assert view_warnings(ViewConfig(flip_probability=0), names) == []


@pytest.mark.parametrize("names", [["cat", "dog"], ["0", "1", "cat"], ["10", "11"], ["one", "someone"], [""], []])
def test_flips_of_other_classes_are_not_warned_of(names):
    assert view_warnings(ViewConfig(), names) == []
