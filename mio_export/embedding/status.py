"""Status of each file of a collection in a store, in a few bytes a file: a collection may have millions."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mio_export.console.progress import Progress
from mio_export.errors import GateError
from mio_export.runtimes.devices import num_threads
from mio_export.sources import SourceFile
from mio_export.store import DUPLICATE, FAILED, OK, StoreInfo, iter_columns, read_rows

_CODES = {OK: 1, DUPLICATE: 2, FAILED: 3}


class StoreStatus:
    """What a store holds of some files.

    Args:
        files: of the collection, each with a key of its own.
        out: the store's folder; shards written later are not looked at.
        info: what it holds.

    Attributes:
        num_vanished: keys in the store that no file has.

    Raises:
        GateError: a shard cannot be read.
        SpaceError: a shard holds vectors of another identity than the store.
    """

    def __init__(self, files: Sequence[SourceFile], out: Path, info: StoreInfo) -> None:
        self._files, self._out = files, out
        self._codes = bytearray(len(files))  # 0: no row
        self._is_current = bytearray(len(files))
        places = {file.key: place for place, file in enumerate(files)}
        vanished: set[str] = set()
        for rows in iter_columns(out, info, ("key", "size", "mtime_ns", "status")):
            for key, size, mtime_ns, status in rows:
                place = places.get(key)
                if place is None:
                    vanished.add(key)
                    continue
                file = files[place]
                self._codes[place] = _CODES.get(status) or _unknown(status, out)
                self._is_current[place] = file.size == size and file.mtime_ns == mtime_ns
        self.num_vanished = len(vanished)

    @property
    def num_failed(self) -> int:
        """Files whose row says that they failed."""
        return self._codes.count(_CODES[FAILED])

    @property
    def num_duplicates(self) -> int:
        """Files that have the bytes of another."""
        return self._codes.count(_CODES[DUPLICATE])

    def todo(
        self, *, retry_failed: bool, rehash: bool, progress: Progress, max_bytes: int | None = None
    ) -> list[SourceFile]:
        """Return the files that have no row, or another size or time than their row, or other bytes if those are read.

        Args:
            retry_failed: also those that failed.
            rehash: read the files whose size and time are as before.
            progress: is told how far reading is.
            max_bytes: of one file; larger ones are not read. None: no limit.
        """
        failed = _CODES[FAILED] if retry_failed else -1
        needed = [code == failed or not current for code, current in zip(self._codes, self._is_current, strict=True)]
        if rehash:
            hashes = {row.key: row.sha256 for row in read_rows(self._out)}

            def needs_work(file: SourceFile, is_needed: bool) -> bool:
                return is_needed or _has_changed(file, hashes[file.key], max_bytes)

            with ThreadPoolExecutor(num_threads()) as pool, progress.task("reading again", len(self._files)) as task:
                for place, found in enumerate(pool.map(needs_work, self._files, needed)):
                    needed[place] = found
                    task.advance()
        return [file for file, is_needed in zip(self._files, needed, strict=True) if is_needed]


def _unknown(status: str, out: Path) -> int:
    raise GateError(f"{out} is damaged: a row's status must be {', '.join(_CODES)}, got {status!r}")


def _has_changed(file: SourceFile, sha256: str | None, max_bytes: int | None) -> bool:
    """Whether a file's bytes are not those of its row."""
    try:
        return hashlib.sha256(file.read(max_bytes)[0]).hexdigest() != sha256
    except OSError:
        return sha256 is not None
