"""Decoded images in a file that is mapped into memory, for data sets larger than it; decoded once, used again."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import PIL

from mio_export.console.progress import Progress
from mio_export.errors import MioError, UsageError
from mio_export.files import staged_file, write_text
from mio_export.preprocess import Pixels, Preprocess
from mio_export.schema import parse_json
from mio_export.train.data.decoding import Decoded, decode_part
from mio_export.train.data.split import Part

_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What lies beside a mapped file; written last, so that a file without it was not finished."""

    schema_version: int
    identity: str
    """Hash of the listing, the contract and the decoder."""
    sha256: str
    """Hash of the keys and contents of all images."""
    failures: tuple[tuple[int, str], ...]
    """Number and reason of each image that could not be read."""


def map_part(part: Part, preprocess: Preprocess, progress: Progress, folder: Path) -> tuple[Pixels, Decoded]:
    """Return a part's decoded images as a mapped file, decoding them only if the folder does not hold them yet.

    They are known again by their listing (place, names, sizes, times of change), not by their contents. Of several
    processes that ask at once, one decodes and the others wait. The files, ``images-*``, may be deleted at any time.

    Args:
        part: the images.
        preprocess: their contract; its mean and deviation play no role.
        progress: is told how far the work is.
        folder: where to keep the files.

    Returns:
        uint8, shape (N, H, W, C), with a row for each image in the part, those that were read first; and what came of
        decoding.

    Raises:
        UsageError: the disk has too little room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    identity = _identity(part, preprocess)
    path = folder / f"images-{identity[:16]}.npy"
    shape = (len(part), *preprocess.shape)
    with _locked(path.with_suffix(".lock"), progress):
        decoded = _stored(path, identity, shape)
        if decoded is None:
            decoded = _write(path, identity, shape, part, preprocess, progress)
        # torch warns of arrays that it may not write to, and a private copy would count as memory: so r+
        return np.asarray(np.lib.format.open_memmap(path, mode="r+")), decoded


def _identity(part: Part, preprocess: Preprocess) -> str:
    """Hash all that the pixels depend on; mean and deviation are applied later, in the encoder's graph."""
    contract = {key: value for key, value in preprocess.to_dict().items() if key not in ("mean", "std")}
    return hashlib.sha256(json.dumps([part.fingerprint, contract, PIL.__version__]).encode()).hexdigest()


def _stored(path: Path, identity: str, shape: tuple[int, ...]) -> Decoded | None:
    """Return what came of decoding if the finished file of these images lies there, else None."""
    sidecar = path.with_suffix(".json")
    try:
        values = parse_json(sidecar.read_bytes(), Sidecar, where=sidecar, newest=_SCHEMA)
        pixels = np.lib.format.open_memmap(path, mode="r")  # r+ would fill up a file that is cut off
    except (OSError, ValueError, MioError):
        return None
    if values.identity != identity or pixels.shape != shape or pixels.dtype != np.uint8:
        return None
    return Decoded(sha256=values.sha256, failures=dict(values.failures))


def _write(
    path: Path, identity: str, shape: tuple[int, ...], part: Part, preprocess: Preprocess, progress: Progress
) -> Decoded:
    for left in (path.with_suffix(".json"), path):
        left.unlink(missing_ok=True)
    with staged_file(path) as temporary:
        temporary.unlink(missing_ok=True)  # of a process that was killed
        _check_room(path.parent, int(np.prod(shape)))
        pixels = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        _reserve(temporary)
        decoded = decode_part(part, preprocess, pixels, progress)
        pixels.flush()
    sidecar = Sidecar(
        schema_version=_SCHEMA,
        identity=identity,
        sha256=decoded.sha256,
        failures=tuple(decoded.failures.items()),
    )
    write_text(path.with_suffix(".json"), json.dumps(asdict(sidecar)) + "\n")
    return decoded


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise _no_room(folder, needed, free)


def _reserve(path: Path) -> None:
    """Take the room on the disk now: writing to a mapped file on a full disk would end the process with a signal."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except AttributeError:  # macOS
            return
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _no_room(path.parent, size, shutil.disk_usage(path.parent).free) from None


def _no_room(folder: Path, needed: int, free: int) -> UsageError:
    return UsageError(
        f"the decoded images need {needed / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free there;"
        " choose a smaller image_size or make room"
    )


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Hold a lock, waiting for it if need be; the system releases it even if the process is killed."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.line("another process is decoding the same images; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


__all__ = ["map_part"]
