"""A store's lock: one writer, or several readers that must not be disturbed."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mio_export.errors import MioError

LOCK = ".lock"
_BUSY = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK)
_TRIES = 10


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a store's lock as its only writer; the system releases it even if the process is killed.

    The lock file lies in the folder, which another writer may replace or remove: a lock on a file that is no longer
    the one in the folder protects nothing, so it is taken again.

    Raises:
        MioError: another process is writing to the store, or reads it to merge it.
    """
    for _ in range(_TRIES):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # the folder was removed meanwhile
        try:
            _lock(descriptor, folder)
            if _is_file_at(descriptor, folder / LOCK):
                yield
                return
        finally:
            os.close(descriptor)
    raise MioError(f"{folder} is being replaced over and over by other processes; try again")


@contextmanager
def shared_lock(folder: Path) -> Iterator[None]:
    """Keep writers out of a store that is only read; nothing is written, not even a lock file.

    Where there is no lock file, or it cannot be read, nothing is locked: the caller has to notice changes.

    Raises:
        MioError: another process is writing to the store.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _BUSY:
                raise _busy(folder) from None  # other errors: this disk knows no locks
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            raise _busy(folder) from None
        raise MioError(f"{folder} cannot be locked ({error.strerror}); choose a disk that supports flock") from None


def _busy(folder: Path) -> MioError:
    return MioError(f"{folder} is being written by another process; wait for it, or choose another -o")


def _is_file_at(descriptor: int, path: Path) -> bool:
    held = os.fstat(descriptor)
    try:
        found = path.stat()
    except OSError:
        return False
    return (held.st_dev, held.st_ino) == (found.st_dev, found.st_ino)
