"""Which contents have a vector already, and where it lies."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mio_export.store import Row, locate, read_vectors


class Originals:
    """The first file of each content, by sha256; a duplicate gets its vector without being computed.

    Threads ask whether a content is known while one thread adds to it; an answer that is out of date costs a decoding,
    never a wrong row.
    """

    def __init__(self, folder: Path) -> None:
        self._known = locate(folder)
        self._begun: dict[str, str] = {}
        self._shard: tuple[Path | None, npt.NDArray[np.float32]] = (None, np.empty((0, 0), np.float32))

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._known or sha256 in self._begun

    def key(self, sha256: str) -> str | None:
        """Return the key of the first file with this content; None if there is none."""
        known = self._known.get(sha256)
        return known[0] if known else self._begun.get(sha256)

    def begin(self, sha256: str, key: str) -> None:
        """Take down a content whose vector will be in the shard that is being made."""
        self._begun[sha256] = key

    def commit(self, path: Path, rows: Sequence[Row]) -> None:
        """Take down where the contents of a shard lie, once it is written."""
        for index, row in enumerate(rows):
            if row.sha256 in self._begun and row.has_vector:
                self._known.setdefault(row.sha256, (row.key, path, index))
        self._begun.clear()

    def vector(self, sha256: str) -> npt.NDArray[np.float32]:
        """Return the vector of a content in a committed shard, shape (D,); the last shard asked for stays in memory."""
        _, path, row = self._known[sha256]
        if self._shard[0] != path:
            self._shard = (path, read_vectors(path))
        vector: npt.NDArray[np.float32] = self._shard[1][row]
        return vector
