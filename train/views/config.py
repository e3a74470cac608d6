"""How views are drawn: the settings, the published presets, and where a setting hurts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from mio_export.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How a view is drawn; the sampling rules are torchvision's, applied to a batch."""

    preset: Literal["gentle", "mio", "simclr", "byol"] = "gentle"
    """Name of the preset that the other values started from; only ``view_values`` fills them in."""
    crop_area: tuple[float, float] = (0.4, 1.0)
    """Share of the image's area that a crop takes, drawn uniformly."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of a crop, drawn uniformly on the log scale."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip; set 0 for digits and text."""
    brightness: float = 0.4
    """Pixels are multiplied by a factor from 1 ± this."""
    contrast: float = 0.4
    """Deviations from the mean grey level are multiplied by a factor from 1 ± this."""
    saturation: float = 0.4
    """Deviations from grey are multiplied by a factor from 1 ± this; colour images only."""
    hue: float = 0.1
    """Turn of the hue circle, from ± this; colour images only."""
    jitter_probability: float = 0.4
    """Probability that an image's colours are jittered at all."""
    grayscale_probability: float = 0.2
    """Probability that a colour image loses its colour."""
    blur_probability: tuple[float, float] = (0.0, 0.0)
    """Probability of a Gaussian blur, in the first and in the second view."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Deviation of the blur in pixels, drawn uniformly; the kernel is about a tenth of the view's side wide."""
    solarize_probability: tuple[float, float] = (0.0, 0.0)
    """Probability that bright pixels are inverted, in the first and in the second view."""
    solarize_threshold: int = 128
    """Pixels of this value or above are inverted, of 0 to 255."""

    def __post_init__(self) -> None:
        for holds, message in [*self._range_checks(), *self._share_checks()]:
            if not holds:
                raise UsageError(f"views: {message}")

    def _range_checks(self) -> list[tuple[bool, str]]:
        low, high = self.crop_area
        return [
            (self.preset in PRESETS, _unknown_preset(self.preset)),
            (0 < low <= high <= 1, f"crop_area must be a range in (0, 1], got {self.crop_area}"),
            (0 < self.crop_aspect[0] <= self.crop_aspect[1], f"crop_aspect must be a range, got {self.crop_aspect}"),
            (0 <= self.hue <= 0.5, f"hue must be 0 to 0.5, got {self.hue}"),
            *(
                (getattr(self, name) >= 0, f"{name} must be 0 or more, got {getattr(self, name)}")
                for name in ("brightness", "contrast", "saturation")
            ),
            (
                0 < self.blur_sigma[0] <= self.blur_sigma[1],
                f"blur_sigma must be a range above 0, got {self.blur_sigma}",
            ),
            (
                0 <= self.solarize_threshold <= 255,
                f"solarize_threshold must be 0 to 255, got {self.solarize_threshold}",
            ),
        ]

    def _share_checks(self) -> list[tuple[bool, str]]:
        single = ("flip_probability", "jitter_probability", "grayscale_probability")
        paired = ("blur_probability", "solarize_probability")
        return [
            *((0 <= getattr(self, name) <= 1, f"{name} must be 0 to 1, got {getattr(self, name)}") for name in single),
            *(
                (
                    all(0 <= share <= 1 for share in getattr(self, name)),
                    f"{name} must be two numbers of 0 to 1, the first and the second view's; got {getattr(self, name)}",
                )
                for name in paired
            ),
        ]


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "gentle": {},
        "mio": {
            "crop_area": (0.8, 1.0),
            "jitter_probability": 0.8,
            "blur_probability": (0.5, 0.5),
            "solarize_probability": (0.2, 0.2),
        },
        "simclr": {
            "crop_area": (0.08, 1.0),
            "brightness": 0.8,
            "contrast": 0.8,
            "saturation": 0.8,
            "hue": 0.2,
            "jitter_probability": 0.8,
            "blur_probability": (0.5, 0.5),
        },
        "byol": {
            "crop_area": (0.08, 1.0),
            "saturation": 0.2,
            "jitter_probability": 0.8,
            "blur_probability": (1.0, 0.1),
            "solarize_probability": (0.0, 0.2),
        },
    }
)
"""What each preset sets apart from the defaults of ``ViewConfig``, which are ``gentle``: small, centred, grey images.

- ``mio``: the published code of MIO (arXiv 2111.12664). It leaves blur and solarise out at 32 px and below.
- ``simclr``: Chen et al. 2020 (arXiv 2002.05709), appendix A, with colour distortion of strength 1. Their CIFAR-10
  runs (appendix B.9) take strength 0.5 and no blur.
- ``byol``: Grill et al. 2020 (arXiv 2006.07733), appendix B, table 6, whose two views differ.
"""


def view_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lay values of ``ViewConfig`` over those of the preset that they name.

    Args:
        values: any of the fields, such as ``{"preset": "byol", "flip_probability": 0}``; no preset means ``gentle``.

    Returns:
        The given values, and the preset's for whatever was not given. They are not checked, except for the preset.

    Raises:
        UsageError: there is no such preset.
    """
    preset = values.get("preset", "gentle")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise UsageError(f"views: {_unknown_preset(preset)}")
    return {**PRESETS[preset], **values}


def view_warnings(config: ViewConfig, class_names: Sequence[str]) -> list[str]:
    """Return a line for each setting that hurts on images of these classes; none if the classes have no names."""
    if config.flip_probability > 0 and class_names and all(_is_character(name) for name in class_names):
        return [
            f"the classes ({_some(class_names)}) look like digits or letters, and a flip makes them others or none "
            f"(flip_probability is {config.flip_probability:g}); switch it off with --set views.flip_probability=0"
        ]
    return []


_SPELLED_DIGITS = frozenset(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])


def _is_character(name: str) -> bool:
    """Whether a class name means one digit or letter: ``7``, ``a``, ``seven``, or ``7 - seven`` as in torchvision."""
    words = name.lower().replace("-", " ").replace("_", " ").split()
    return bool(words) and all(len(word) == 1 or word in _SPELLED_DIGITS for word in words)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _unknown_preset(preset: object) -> str:
    return f"preset must be one of {', '.join(PRESETS)}; got {preset!r}"


__all__ = ["PRESETS", "ViewConfig", "view_values", "view_warnings"]
