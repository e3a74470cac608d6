"""One writer at a time for the manifest of a bundle, on one machine or on several that share a disk."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mio_export.bundle.manifest import LOCK


@contextmanager
def bundle_lock(bundle: Path) -> Iterator[None]:
    """Hold the lock of a bundle; waits until no other process holds it, and the system frees that of a killed one.

    The lock lies in the bundle, so that whoever may write its manifest may take it. An export exchanges the whole
    folder, lock and all, while it holds the old one: whoever waited for that finds another file there, and waits again.

    Raises:
        OSError: the bundle cannot be written.
    """
    path = bundle / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, path):
                yield
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


__all__ = ["bundle_lock"]
