"""A store that grows shard by shard: each content has one vector there, and writing goes on beside the work."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np

from mio_export.embedding.pipeline import StageTimer
from mio_export.store import (
    DUPLICATE,
    FAILED,
    Row,
    StoreInfo,
    Vector,
    locate,
    next_number,
    read_vectors,
    shard_path,
    write_shard,
)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the vector of a content lies."""

    key: str
    path: Path
    row: int


class StoreWriter:
    """Appends shards, one after the other; of equal contents the first file has the vector, the others are duplicates.

    Args:
        out: the store's folder.
        info: what it holds; a part numbers its shards as the whole would.
        timer: is told how long the work waited for the disk.
    """

    def __init__(self, out: Path, info: StoreInfo, timer: StageTimer) -> None:
        self._out, self._info, self._timer = out, info, timer
        self._places = {sha256: _Place(*place) for sha256, place in locate(out, info).items()}
        self._step = info.part.count if info.part else 1
        self._next = next_number(out, info.part)
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __contains__(self, sha256: str) -> bool:
        return bytes.fromhex(sha256) in self._places

    def append(self, rows: Sequence[Row], vectors: Mapping[str, Vector]) -> None:
        """Write a shard; once the next one is appended, it is on the disk.

        Args:
            rows: its files; which are duplicates is found out here.
            vectors: of every content that the store does not have yet, by sha256, shape (D,); one that failed when
                it was embedded has none, and all files that hold it fail with it.
        """
        start = time.perf_counter()
        self._flush()
        path = shard_path(self._out, self._next)
        stored: dict[Path, list[tuple[int, int]]] = {}
        written: list[Row] = []
        values = np.zeros((sum(row.has_vector for row in rows), self._info.embedding_dim), np.float32)
        failed = {row.sha256: row for row in rows if row.status == FAILED and row.sha256 is not None}
        count = 0
        for index, row in enumerate(rows):
            if row.status == FAILED:
                written.append(row)
                continue
            sha256 = row.sha256 or ""  # a file that was read has one
            digest = bytes.fromhex(sha256)  # half of its text's memory; there is one for each content
            place = self._places.get(digest)
            if place is None and sha256 not in vectors and sha256 in failed:
                same = failed[sha256]
                written.append(replace(row, status=FAILED, stage=same.stage, reason=same.reason))
                continue
            if place is None:
                place = self._places[digest] = _Place(row.key, path, index)
            if place.path == path:
                values[count] = vectors[sha256]
            else:
                stored.setdefault(place.path, []).append((count, place.row))
            written.append(
                row if place.key == row.key else replace(row, status=DUPLICATE, reason=f"same bytes as {place.key}")
            )
            count += 1
        for other, pairs in stored.items():  # each shard is opened once
            targets, sources = np.array(pairs).T
            values[targets] = read_vectors(other, self._info)[sources]
        self._next += self._step
        self._pending = self._pool.submit(write_shard, path, self._info, written, values[:count])
        self._timer.add("write", time.perf_counter() - start)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._flush()
        finally:
            self._pool.shutdown()

    def _flush(self) -> None:
        """Wait for the shard that is being written."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
