"""Removing rows from a store, the only thing that rewrites shards."""

from pathlib import Path

import pyarrow as pa

from mio_export.store.info import require_info
from mio_export.store.shards import read_table, shard_paths, write_table


def prune(folder: Path, keep: frozenset[str]) -> int:
    """Drop the rows of all keys but ``keep``, and rows that a later shard replaces; return how many keys went.

    Each shard is rewritten whole or not at all, the oldest first, so that the row that counts is the last to go: it may
    be killed at any moment, and done again.

    Raises:
        GateError: a shard cannot be read; nothing was removed.
        SpaceError: a shard holds vectors of another identity than the store; nothing was removed.
    """
    info, shards = require_info(folder), shard_paths(folder)
    last = {key: path for path in shards for key in read_table(path, info, ["key"]).column("key").to_pylist()}
    for path in shards:
        table = read_table(path, info)
        stays = [key in keep and last[key] == path for key in table.column("key").to_pylist()]
        if not any(stays):
            path.unlink()
        elif not all(stays):
            write_table(path, table.filter(pa.array(stays)))
    return sum(key not in keep for key in last)
