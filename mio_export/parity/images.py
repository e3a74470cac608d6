"""The real images that artifacts are compared on, and the others that int8 is calibrated on."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mio_export.decoding import Decoder
from mio_export.errors import OutOfMemoryError, UsageError
from mio_export.parity.report import Labels
from mio_export.preprocess import DecodeError, Pixels, Preprocess
from mio_export.sample import read_sample
from mio_export.sources import SourceFile, evenly_spaced, list_images

MIN_CALIBRATION = 128
_MAX_CALIBRATION = 512
_MIN_HELD_OUT = 32
_SAMPLE_IMAGES = 64


@dataclass(frozen=True, kw_only=True)
class ParityImages:
    """Decoded images and what they are."""

    pixels: Pixels
    """uint8, shape (N, H, W, C)."""
    labels: Labels | None
    """Their class folders as numbers, shape (N,); None if there are no two classes."""
    description: str

    @property
    def sha256(self) -> str:
        """Hash of shape and pixels."""
        return hashlib.sha256(str(self.pixels.shape).encode() + self.pixels.tobytes()).hexdigest()


def parity_images(
    preprocess: Preprocess, folder: Path | None = None, *, limit: int = 256, for_int8: bool = False
) -> tuple[ParityImages, ParityImages | None]:
    """Decode the images to prove artifacts on and, for int8, others to calibrate on; both at even distances.

    Args:
        preprocess: the decode contract.
        folder: the user's images; None: a part of the embedded sample, which serves for proof only.
        limit: number of images to prove on.
        for_int8: whether images are needed to calibrate on.

    Raises:
        UsageError: none of the folder's images can be read, or too few for int8.
        OutOfMemoryError: there is not enough memory to decode one of them.
    """
    if folder is None:
        if for_int8:
            raise UsageError("int8 is calibrated on your images; add --images DIR")
        pixels = np.stack([preprocess.decode(data) for data in read_sample("test", limit=min(limit, _SAMPLE_IMAGES))])
        return ParityImages(
            pixels=pixels, labels=None, description=f"{len(pixels)} images of the embedded sample"
        ), None
    files = list_images(folder).files
    if not for_int8:
        return _decoded(folder, evenly_spaced(files, limit) if files else [], preprocess), None
    calibrating = max(MIN_CALIBRATION, min(_MAX_CALIBRATION, len(files) // 2))
    if len(files) - calibrating < _MIN_HELD_OUT:
        raise UsageError(
            f"int8 needs {MIN_CALIBRATION} images to calibrate on and {_MIN_HELD_OUT} others to prove it on;"
            f" {folder} has {len(files)}"
        )
    proving = evenly_spaced(files, min(limit, len(files) - calibrating))
    taken = {file.key for file in proving}
    rest = _decoded(folder, evenly_spaced([f for f in files if f.key not in taken], calibrating), preprocess)
    if len(rest.pixels) < MIN_CALIBRATION:
        raise UsageError(f"int8 needs {MIN_CALIBRATION} images to calibrate on; {len(rest.pixels)} can be read")
    return _decoded(folder, proving, preprocess), rest


def _decoded(folder: Path, files: Sequence[SourceFile], preprocess: Preprocess) -> ParityImages:
    found = list(_readable(files, preprocess))
    if not found:
        raise UsageError(f"no image in {folder} can be read; parity needs real images")
    return ParityImages(
        pixels=np.stack([pixels for _, pixels in found]),
        labels=_labels([key for key, _ in found]),
        description=f"{len(found)} images of the given folder",
    )


def _readable(files: Sequence[SourceFile], preprocess: Preprocess) -> Iterator[tuple[str, Pixels]]:
    with Decoder(preprocess) as decoder:
        for file in files:
            try:
                yield file.key, decoder.decode(file.read(decoder.limits.max_file_bytes)[0])
            except (OSError, DecodeError):
                continue
            except MemoryError as error:
                raise OutOfMemoryError(
                    f"there is not enough memory to decode {file.key}; free memory, then run it again"
                ) from error


def _labels(keys: Sequence[str]) -> Labels | None:
    """Number the class folders; None unless there are two, with two images each on average."""
    names = [key.split("/")[0] if "/" in key else "" for key in keys]
    classes, labels = np.unique(names, return_inverse=True)
    return labels.astype(np.int64) if 2 <= len(classes) <= len(keys) / 2 else None
