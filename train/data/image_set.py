"""Images for training and evaluation, decoded once: uint8 in memory, or mapped from the disk if too many."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mio_export.console.progress import Progress
from mio_export.errors import MioError, UsageError
from mio_export.preprocess import Pixels, Preprocess
from mio_export.train.data.decoding import Decoded, decode_part, kept_rows
from mio_export.train.data.mapped import map_part
from mio_export.train.data.split import Labels, Part


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Decoded images in the order of their keys."""

    pixels: Pixels
    """uint8, shape (N, H, W, C); not to be written to, as it may be a mapped file."""
    labels: Labels | None
    """Class of each image, shape (N,); None if there are none."""
    class_names: tuple[str, ...]
    keys: tuple[str, ...]
    """Name of each image."""
    sha256: str
    """Hash of the keys and contents of all images, unreadable ones included."""
    failures: tuple[str, ...]
    """Images that could not be read, ``key: reason``."""


def load_images(
    part: Part,
    preprocess: Preprocess,
    progress: Progress | None = None,
    *,
    scratch: Path | None = None,
    memory_bytes: int | None = None,
) -> ImageSet:
    """Decode a part; what cannot be read is left out and named, never replaced.

    Args:
        part: the images.
        preprocess: their contract; its mean and deviation play no role.
        progress: is told how far the work is; None: nobody is.
        scratch: a folder for images that need more memory than they may have; a later call with the same images finds
            them there and decodes nothing.
        memory_bytes: the most that they may have in memory; None means half of what is free.

    Raises:
        MioError: no image can be read.
        UsageError: the images fit neither into memory nor into ``scratch``.
    """
    progress, shape = progress or Progress(), (len(part), *preprocess.shape)
    needed = int(np.prod(shape))
    allowed = _half_of_free_bytes() if memory_bytes is None else memory_bytes
    if allowed is None or needed <= allowed:
        pixels = np.empty(shape, dtype=np.uint8)
        decoded = decode_part(part, preprocess, pixels, progress)
    elif scratch is not None:
        pixels, decoded = map_part(part, preprocess, progress, scratch)
    else:
        raise UsageError(
            f"{len(part):,} images of {preprocess.image_size} px need {needed / 1e9:.1f} GB in memory,"
            f" {allowed / 1e9:.1f} GB are allowed (half of what is free); choose a smaller image_size or fewer images"
        )
    return _image_set(part, pixels, decoded)


def _image_set(part: Part, pixels: Pixels, decoded: Decoded) -> ImageSet:
    keys = part.keys
    failures = tuple(f"{keys[index]}: {reason}" for index, reason in sorted(decoded.failures.items()))
    kept = kept_rows(len(part), decoded.failures)
    if not len(kept):
        raise MioError(f"none of {len(part):,} images can be read; the first: {failures[0]}")
    return ImageSet(
        pixels=pixels[: len(kept)],
        labels=part.labels[kept] if part.labels is not None else None,
        class_names=part.class_names,
        keys=tuple(keys[index] for index in kept.tolist()),
        sha256=decoded.sha256,
        failures=failures,
    )


def _half_of_free_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // 2
    except OSError:
        return None
    return None


__all__ = ["ImageSet", "load_images"]
