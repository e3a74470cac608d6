"""What a look at a part's images says of them: their size, their channels, their mean."""

import io
import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from mio_export.errors import MioError
from mio_export.preprocess import Pixels
from mio_export.sources import evenly_spaced
from mio_export.train.data.image_set import ImageSet
from mio_export.train.data.split import Part

_PROBED = 200
_BLOCK_BYTES = 16_000_000
_EXACT_BYTES = 2_000_000_000
_SAMPLED = 10_000
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"})


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a look at some of the images suggests."""

    image_size: int
    """Median shorter side in pixels, 8 to 224."""
    channels: Literal[1, 3]
    """1 if all of them are grey, else 3."""


def probe_geometry(part: Part) -> Geometry:
    """Look at 200 images, evenly evenly_spaced, without decoding them; at the others too, until one can be read.

    Raises:
        MioError: none of them is an image.
    """
    sides: list[int] = []
    grey: list[bool] = []
    for number, index in enumerate(itertools.chain(evenly_spaced(range(len(part)), _PROBED), range(len(part)))):
        if sides and number >= _PROBED:
            break
        try:
            side, is_grey = _look(part.read(index))
        except Exception:  # noqa: BLE001 - decoding names every unreadable file; this is only a look
            continue
        sides.append(side)
        grey.append(is_grey)
    if not sides:
        raise MioError("none of the training images can be read")
    return Geometry(image_size=min(224, max(8, int(np.median(sides)))), channels=1 if all(grey) else 3)


def mean_and_std(images: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, pixels counted in [0, 1].

    Of more than 2 GB, 10,000 images are counted, evenly spread: the mean of an image varies by about 0.2 from one to
    the next, so that of 10,000 is known to 0.002, and a data set on disk need not be read whole.
    """
    pixels = images.pixels
    indices = evenly_spaced(range(len(pixels)), len(pixels) if pixels.nbytes <= _EXACT_BYTES else _SAMPLED)
    num_blocks = min(len(indices), max(1, len(indices) * pixels[0].nbytes // _BLOCK_BYTES))
    counts = np.zeros((pixels.shape[-1], 256), dtype=np.int64)
    for chosen in np.array_split(indices, num_blocks):
        block = pixels[chosen]
        counts += [np.bincount(block[..., channel].reshape(-1), minlength=256) for channel in range(len(counts))]
    levels = np.arange(256) / 255
    means = [float((count * levels).sum() / count.sum()) for count in counts]
    deviations = [
        float(np.sqrt((count * (levels - mean) ** 2).sum() / count.sum()))
        for count, mean in zip(counts, means, strict=True)
    ]
    return tuple(round(mean, 6) for mean in means), tuple(max(round(value, 6), 1e-3) for value in deviations)


def _look(content: bytes | Pixels) -> tuple[int, bool]:
    """Return the shorter side in pixels, and whether the image is grey."""
    if isinstance(content, bytes):
        with Image.open(io.BytesIO(content)) as image:
            return min(image.size), image.mode in _GREY_MODES
    return min(content.shape[:2]), content.shape[2] == 1


__all__ = ["Geometry", "mean_and_std", "probe_geometry"]
