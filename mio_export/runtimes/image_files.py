"""Image files to vectors: what ``embed_files`` of every runtime does."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mio_export.decoding import Decoder
from mio_export.errors import OutOfMemoryError, UsageError
from mio_export.memory import lacks_memory
from mio_export.preprocess import DecodeError, Pixels
from mio_export.runtimes.devices import num_threads
from mio_export.sources import read_file

if TYPE_CHECKING:
    from mio_export.runtimes.base import Runtime

ImageFile = bytes | str | Path
"""The whole bytes of an image file, or its path."""


def embed_image_files(
    runtime: "Runtime", files: Sequence[ImageFile], decoder: Decoder, *, batch_size: int
) -> tuple[npt.NDArray[np.float32], list[str | None]]:
    """Decode and embed image files, a batch at a time.

    Args:
        runtime: what embeds.
        files: whole bytes or paths, one or more.
        decoder: of the runtime's contract.
        batch_size: images that are held and embedded at once, ≥ 1.

    Returns:
        float32, shape (N, D), NaN where a file failed; and the reason of each, None where it did not.

    Raises:
        UsageError: ``files`` is empty, or one file instead of a list.
        OutOfMemoryError: there is not enough memory to decode a file.
    """
    check_files(files)
    vectors = np.full((len(files), runtime.embedding_dim), np.nan, np.float32)
    reasons: list[str | None] = []
    with ThreadPoolExecutor(num_threads()) as pool:
        for start in range(0, len(files), batch_size):
            decoded = list(pool.map(lambda file: _decoded(file, decoder), files[start : start + batch_size]))
            reasons += [found if isinstance(found, str) else None for found in decoded]
            images = {start + row: found for row, found in enumerate(decoded) if not isinstance(found, str)}
            if images:
                vectors[list(images)] = runtime.embed(np.stack(list(images.values())))
    for row in np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist():
        vectors[row], reasons[row] = np.nan, reasons[row] or "its embedding is not finite"
    return vectors, reasons


def check_files(files: Sequence[ImageFile]) -> None:
    """Refuse what is no list of files.

    Raises:
        UsageError: it is empty, or one file.
    """
    if isinstance(files, ImageFile):
        raise UsageError(f"files must be a list of paths or bytes, got one {type(files).__name__}")
    if not files:
        raise UsageError("there is no image to embed")


def numbered(reasons: Sequence[str | None]) -> list[str | None]:
    """Put the number of its image before each reason."""
    return [None if reason is None else f"image {number}: {reason}" for number, reason in enumerate(reasons)]


def content_of(file: ImageFile, max_bytes: int) -> bytes:
    """Return an image file's bytes.

    Raises:
        OSError: its path cannot be read, or it has more bytes; ``cannot_be_read`` says it.
        MemoryError: the machine has not enough memory.
    """
    if isinstance(file, bytes):
        return file
    try:
        return read_file(file, max_bytes)[0]
    except OSError as error:
        if lacks_memory(error):
            raise MemoryError(error.strerror) from error
        raise
    except ValueError as error:  # a name that no file can have
        raise OSError(str(error)) from None


def cannot_be_read(error: OSError) -> str:
    """Return the reason of a file that cannot be read."""
    return f"cannot be read: {error.strerror or error}"


def _decoded(file: ImageFile, decoder: Decoder) -> Pixels | str:
    """Return pixels, or the reason why there are none."""
    try:
        return decoder.decode(content_of(file, decoder.limits.max_file_bytes))
    except OSError as error:
        return cannot_be_read(error)
    except DecodeError as error:
        return str(error)
    except MemoryError as error:
        name = f"an image of {len(file):,} bytes" if isinstance(file, bytes) else file
        raise OutOfMemoryError(
            f"there is not enough memory to decode {name}; free memory, then run it again"
        ) from error


__all__ = ["ImageFile", "cannot_be_read", "check_files", "content_of", "embed_image_files", "numbered"]
