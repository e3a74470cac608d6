"""The real images that artifacts are compared on."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mio_export.errors import UsageError
from mio_export.preprocess import DecodeError, Pixels, Preprocess
from mio_export.sample import read_sample
from mio_export.sources import list_images, read_file, spread

_PHOTO_CROP = 160


@dataclass(frozen=True, kw_only=True)
class ParityImages:
    """Decoded images and what they are."""

    pixels: Pixels
    """uint8, shape (N, H, W, C)."""
    sha256: str
    """Hash of shape and pixels."""
    description: str


def parity_images(preprocess: Preprocess, folder: Path | None = None, *, limit: int = 256) -> ParityImages:
    """Decode the images to prove artifacts on.

    A folder's images are taken at even distances. For three channels, crops of two colour photographs always come on
    top: grey images alone would hide swapped channels. Without a folder the embedded sample stands in for it.

    Raises:
        UsageError: none of the folder's images can be read.
    """
    if folder is None:
        pixels = [preprocess.decode(data) for data in read_sample("test", limit=min(limit, 64))]
        description = f"{len(pixels)} images of the embedded sample"
    else:
        pixels = list(_decoded(folder, preprocess, limit))
        description = f"{len(pixels)} images of the given folder"
    if preprocess.channels == 3:
        photos = list(_photo_crops(preprocess))
        pixels += photos
        description += f" and {len(photos)} crops of two colour photographs"
    array = np.stack(pixels)
    digest = hashlib.sha256(str(array.shape).encode() + array.tobytes()).hexdigest()
    return ParityImages(pixels=array, sha256=digest, description=description)


def _decoded(folder: Path, preprocess: Preprocess, limit: int) -> Iterator[Pixels]:
    found = 0
    for file in spread(list_images(folder).files, limit):
        try:
            yield preprocess.decode(read_file(file.path)[0])
            found += 1
        except (OSError, DecodeError):
            continue
    if not found:
        raise UsageError(f"no image in {folder} can be read; parity needs real images")


def _photo_crops(preprocess: Preprocess) -> Iterator[Pixels]:
    """Crops of the two photographs that scikit-learn ships."""
    from sklearn.datasets import load_sample_images

    for photo in load_sample_images().images:
        height, width = photo.shape[:2]
        for top in range(0, height - _PHOTO_CROP, _PHOTO_CROP):
            for left in range(0, width - _PHOTO_CROP + 1, _PHOTO_CROP):
                crop = photo[top : top + _PHOTO_CROP, left : left + _PHOTO_CROP]
                yield preprocess.pixels(Image.fromarray(crop))
