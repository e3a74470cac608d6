"""From a part's images to one uint8 array; what cannot be read is left out and named, never replaced."""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mio_export.console.progress import Progress
from mio_export.decoding import Decoder
from mio_export.errors import OutOfMemoryError
from mio_export.preprocess import DecodeError, Pixels, Preprocess
from mio_export.runtimes.devices import num_threads
from mio_export.train.data.split import Part

_BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What came of decoding a part."""

    sha256: str
    """Hash of the keys and contents of all images, unreadable ones included."""
    failures: Mapping[int, str]
    """Why an image could not be read, by its number in the part."""


def decode_part(part: Part, preprocess: Preprocess, pixels: Pixels, progress: Progress) -> Decoded:
    """Decode a part into an array with a row for each image; those that were read end up at its beginning.

    Args:
        part: the images.
        preprocess: their contract.
        pixels: uint8, shape (N, H, W, C); written to.
        progress: is told how far the work is.

    Raises:
        OutOfMemoryError: there is not enough memory to decode an image.
    """
    digest = hashlib.sha256()
    failures: dict[int, str] = {}
    blocks = [range(start, min(start + _BLOCK, len(part))) for start in range(0, len(part), _BLOCK)]
    keys = part.keys

    def work(block: range) -> list[tuple[str, str | None]]:
        return [_decode(part, index, preprocess, decoder, pixels) for index in block]

    with (
        ThreadPoolExecutor(num_threads()) as pool,
        Decoder(preprocess) as decoder,
        progress.task("decoding", len(part)) as task,
    ):
        for block, outcomes in zip(blocks, pool.map(work, blocks), strict=True):
            for index, (sha256, reason) in zip(block, outcomes, strict=True):
                digest.update(f"{keys[index]}\0{sha256}\n".encode())
                if reason is not None:
                    failures[index] = reason
            task.advance(len(block))
    _close_gaps(pixels, failures)
    return Decoded(sha256=digest.hexdigest(), failures=failures)


def _decode(part: Part, index: int, preprocess: Preprocess, decoder: Decoder, pixels: Pixels) -> tuple[str, str | None]:
    """Decode one image into its row; return the sha256 of its content, and why it could not be read."""
    try:
        content = part.read(index)
    except OSError as error:
        return "", str(error.strerror or error)
    sha256 = hashlib.sha256(content if isinstance(content, bytes) else content.data).hexdigest()
    try:
        pixels[index] = _pixels(content, preprocess, decoder)
    except DecodeError as error:
        return sha256, str(error)
    except MemoryError as error:
        raise OutOfMemoryError(
            f"there is not enough memory to decode {part.keys[index]}; free memory, then run it again"
        ) from error
    return sha256, None


def _pixels(content: bytes | Pixels, preprocess: Preprocess, decoder: Decoder) -> Pixels:
    """Bring an image to the contract's pixels; bare pixels that need no resizing are taken as they are."""
    if isinstance(content, bytes):
        return decoder.decode(content)
    if content.shape == preprocess.shape and preprocess.shorter_side == preprocess.image_size:
        return content
    return preprocess.pixels(Image.fromarray(content.squeeze(2) if content.shape[2] == 1 else content))


def _close_gaps(pixels: Pixels, failures: Iterable[int]) -> None:
    """Move the rows after each failure forward, so that no row is left without its image."""
    missing = set(failures)
    if not missing:
        return
    kept = (index for index in range(len(pixels)) if index not in missing)
    for row, index in enumerate(kept):
        if row != index:
            pixels[row] = pixels[index]


def kept_rows(num_images: int, failures: Iterable[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the numbers of the images that were read, in order."""
    return np.setdiff1d(np.arange(num_images), np.array(list(failures), dtype=np.int64), assume_unique=True)


__all__ = ["Decoded", "decode_part", "kept_rows"]
