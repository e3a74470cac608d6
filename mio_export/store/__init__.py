"""The embedding store: Parquet shards plus ``store.json``; a renamed shard is the commit.

Shards are never changed by later runs: a file that changed gets a new row in a new shard, and for each key the row in
the last shard counts. Only pruning rewrites a shard, whole.
"""

from mio_export.store.info import (
    IDENTITY,
    SCHEMA_VERSION,
    STORE,
    Part,
    Span,
    StoreInfo,
    read_info,
    require_info,
    write_info,
)
from mio_export.store.locking import LOCK, locked, shared_lock
from mio_export.store.pruning import prune
from mio_export.store.reading import (
    Embeddings,
    iter_columns,
    latest_rows,
    load_embeddings,
    load_with_rows,
    locate,
    read_rows,
)
from mio_export.store.shards import (
    DUPLICATE,
    FAILED,
    OK,
    Row,
    Shard,
    Vector,
    check_width,
    list_shards,
    next_number,
    read_vectors,
    shard_number,
    shard_path,
    shard_paths,
    write_shard,
)
from mio_export.store.snapshot import Snapshot, consistent

__all__ = [
    "DUPLICATE",
    "FAILED",
    "IDENTITY",
    "LOCK",
    "OK",
    "SCHEMA_VERSION",
    "STORE",
    "Embeddings",
    "Part",
    "Row",
    "Shard",
    "Snapshot",
    "Span",
    "StoreInfo",
    "Vector",
    "check_width",
    "consistent",
    "iter_columns",
    "latest_rows",
    "list_shards",
    "load_embeddings",
    "load_with_rows",
    "locate",
    "locked",
    "next_number",
    "prune",
    "read_info",
    "read_rows",
    "read_vectors",
    "require_info",
    "shard_number",
    "shard_path",
    "shard_paths",
    "shared_lock",
    "write_info",
    "write_shard",
]
