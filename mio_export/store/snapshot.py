"""A store read as it was at one moment, though another process may write to it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mio_export.errors import MioError
from mio_export.store.info import require_info
from mio_export.store.shards import (
    COLUMNS,
    Row,
    Shard,
    ShardChangedError,
    columns_of,
    list_shards,
    opened,
    rows_of,
    vectors_of,
)

T = TypeVar("T")
_TRIES = 5
_FIRST_PAUSE_S = 0.1


class Snapshot:
    """The shards that a store has now; later ones are not looked at.

    Attributes:
        folder: of the store.
        info: what they have in common.
        shards: the oldest first.

    Raises:
        UsageError: the folder is no store.
        GateError: its description is damaged, or a file is named like a shard and is none.
        ShardChangedError: a shard was removed while they were listed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info = require_info(folder)
        self.shards = list_shards(folder)

    def read(self, shard: Shard, columns: Sequence[str]) -> pa.Table:
        """Read columns of a shard.

        Raises:
            GateError: it cannot be read.
            SpaceError: it holds vectors of another identity than the store.
            ShardChangedError: it is not what it was.
        """
        with self.opened(shard) as file:
            return columns_of(shard.path, file, columns)

    def read_shard(self, shard: Shard) -> tuple[list[Row], npt.NDArray[np.float32]]:
        """Return all rows of a shard, and a vector for each, shape (rows, D), undefined where there is none.

        Raises:
            MioError: as for ``read``.
        """
        table = self.read(shard, COLUMNS)
        return rows_of(shard.path, table), vectors_of(shard.path, table, self.info)

    @contextmanager
    def opened(self, shard: Shard) -> Iterator[pq.ParquetFile]:
        """Open a shard; errors as in ``read``."""
        with opened(shard.path, self.info, stamp=shard.stamp) as file:
            yield file

    def holds(self) -> bool:
        """Whether everything is still there as it was; new shards may have come."""
        try:
            now = Snapshot(self.folder)
        except MioError:
            return False
        return now.info.identity == self.info.identity and now.shards[: len(self.shards)] == self.shards


def consistent(folder: Path, read: Callable[[Snapshot], T]) -> T:
    """Return what ``read`` makes of a snapshot; it is read again if the store changed meanwhile.

    Raises:
        UsageError: there is no store.
        GateError: a shard cannot be read.
        SpaceError: a shard holds vectors of another identity than the store.
        MioError: the store changed each time.
    """
    for attempt in range(_TRIES):
        snapshot = None
        try:
            snapshot = Snapshot(folder)
            value = read(snapshot)
            if snapshot.holds():
                return value
        except ShardChangedError:
            pass
        except MioError:
            if snapshot is None or snapshot.holds():
                raise  # it was no change that spoilt it
        time.sleep(_FIRST_PAUSE_S * 2**attempt)
    raise MioError(f"{folder} changed each time while it was read; once its writer is done, try again")
