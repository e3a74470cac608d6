"""Vectors kept beyond one store, by content: a collection that was renamed or moved costs no inference."""

import hashlib
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mio_export.errors import MioError
from mio_export.store import StoreInfo, Vector

_WAIT_S = 60


def _made_by(info: StoreInfo) -> list[str]:
    """Return everything that decides a vector: what a cache holds must be what would be computed."""
    versions = info.spans[-1].versions if info.spans else {}
    return [*info.identity.values(), info.device, *(f"{name} {text}" for name, text in sorted(versions.items()))]


class Cache:
    """A SQLite file in a folder, one for each way to compute vectors; threads and processes may use it at once.

    Args:
        folder: where it lies.
        info: of the store; its identity, its device and the versions of its last span are the file's name.

    Raises:
        MioError: it is damaged, or cannot be written.
    """

    def __init__(self, folder: Path, info: StoreInfo) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256("\n".join(_made_by(info)).encode()).hexdigest()[:32]
        self.path = folder / f"{name}.sqlite"
        self._lock, self._width = threading.Lock(), info.embedding_dim
        with self._one_line():
            self._connection = sqlite3.connect(self.path, timeout=_WAIT_S, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS vectors (sha256 BLOB PRIMARY KEY, vector BLOB NOT NULL) WITHOUT ROWID"
            )

    def get(self, sha256: str) -> Vector | None:
        """Return the vector of a content, float32 (D,); None if there is none.

        Raises:
            MioError: what is kept is no vector of the store's width, or not finite.
        """
        with self._one_line(), self._lock:
            found = self._connection.execute(
                "SELECT vector FROM vectors WHERE sha256 = ?", (bytes.fromhex(sha256),)
            ).fetchone()
        return self._checked(found[0]) if found else None

    def put(self, vectors: Mapping[str, Vector]) -> None:
        """Keep vectors, by the sha256 of their contents; all or none."""
        rows = [(bytes.fromhex(sha256), vector.astype(np.float32).tobytes()) for sha256, vector in vectors.items()]
        with self._one_line(), self._lock, self._connection:
            self._connection.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", rows)

    def close(self) -> None:
        """Let go of the file, when no thread reads it: SQLite crashes if it is closed meanwhile."""
        with self._lock:
            self._connection.close()

    def _checked(self, kept: object) -> Vector:
        if isinstance(kept, bytes) and len(kept) == 4 * self._width:
            vector: Vector = np.frombuffer(kept, np.float32)
            if np.isfinite(vector).all():
                return vector
        raise MioError(
            f"the cache {self.path} is damaged: it holds something that is no vector of {self._width} finite numbers;"
            " delete it, or leave --cache out"
        )

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise MioError(f"the cache {self.path} cannot be used: {error}; delete it, or leave --cache out") from None
