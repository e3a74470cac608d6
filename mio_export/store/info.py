"""``store.json``: what all vectors of a store have in common, and which versions computed which shards."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mio_export.errors import GateError, UsageError
from mio_export.schema import read_json, strict, write_json

STORE = "store.json"
SCHEMA_VERSION = 2
"""1 had no ``spans``, and its shards do not name their runtime."""
IDENTITY = ("space", "artifact_sha256", "precision", "decode", "runtime")
"""What vectors must have in common to lie in one store; each shard's metadata holds it as ``mio.NAME``."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Which part of a collection a store holds: of its shards, every ``count``-th from the ``index``-th on."""

    index: int
    """From 1 to ``count``."""
    count: int
    num_files: int
    """Of the whole collection."""
    listing_sha256: str
    """Hash of the keys of the whole collection."""

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@strict
@dataclass(frozen=True, kw_only=True)
class Span:
    """The shards from one number on, up to the next span, and what computed them."""

    first_shard: int
    """Number of its first shard."""
    versions: Mapping[str, str]
    """Of everything that decides a vector's last bits, by name; empty: unknown."""


@strict
@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """The whole of ``store.json``. Nothing but the spans changes once the store has a row."""

    schema_version: int = SCHEMA_VERSION
    bundle: str
    """Name of the bundle."""
    space: str
    """Fingerprint of the embedding space."""
    artifact_file: str
    artifact_sha256: str
    precision: str
    decode: str = "full"
    """How images are decoded: ``full``, or ``scaled``: large JPEGs at a fraction of their size."""
    runtime: str
    device: str
    embedding_dim: int
    normalized: bool
    batch_size: int
    shard_size: int
    part: Part | None = None
    """None if the store is whole."""
    spans: tuple[Span, ...] = field(default=())
    """Which versions computed which shards, in the order of their numbers."""

    @property
    def identity(self) -> dict[str, str]:
        """What makes vectors comparable; it travels in every file that holds some."""
        return {name: getattr(self, name) for name in IDENTITY}

    def versions_of(self, shard_number: int) -> Mapping[str, str]:
        """Return the versions that computed a shard; empty if they are unknown."""
        spans = [span for span in self.spans if span.first_shard <= shard_number]
        return spans[-1].versions if spans else {}


def read_info(folder: Path) -> StoreInfo | None:
    """Read ``store.json``; None if the folder is no store yet.

    A store of an earlier schema is returned as one of today's whose versions are unknown.

    Raises:
        GateError: it is damaged.
        MioError: it was written by a newer mio-export.
    """
    path = folder / STORE
    if not path.is_file():
        return None
    info = read_json(path, StoreInfo, newest=SCHEMA_VERSION)
    _check(info, path)
    if info.schema_version < SCHEMA_VERSION:
        return replace(info, schema_version=SCHEMA_VERSION, spans=(Span(first_shard=0, versions={}),))
    return info


def require_info(folder: Path) -> StoreInfo:
    """Read ``store.json`` of a folder that must be a store.

    Raises:
        UsageError: it is none.
        GateError: it is damaged.
        MioError: it was written by a newer mio-export.
    """
    info = read_info(folder)
    if info is None:
        raise UsageError(f"{folder} is not an embedding store (it holds no {STORE}); make one with: mio embed")
    return info


def write_info(folder: Path, info: StoreInfo) -> None:
    """Write ``store.json``."""
    write_json(folder / STORE, info)


def _check(info: StoreInfo, path: Path) -> None:
    """Refuse numbers that no store can have."""
    numbers = {name: getattr(info, name) for name in ("embedding_dim", "batch_size", "shard_size")}
    part = info.part
    if part is not None:
        numbers |= {"part.index": part.index, "part.count": part.count, "part.num_files": part.num_files}
    for name, value in numbers.items():
        if value < 1:
            raise GateError(f"{path} is damaged: {name} must be 1 or more, got {value}")
    if part is not None and part.index > part.count:
        raise GateError(f"{path} is damaged: part.index must be at most part.count ({part.count}), got {part.index}")
    firsts = [span.first_shard for span in info.spans]
    if any(first < 0 for first in firsts) or sorted(set(firsts)) != firsts:
        raise GateError(f"{path} is damaged: spans must begin at 0 or more and ascend, got {firsts[:5]}")
    if info.decode not in ("full", "scaled"):
        raise GateError(f"{path} is damaged: decode must be full or scaled, got {info.decode!r}")
    if any("\0" in text for text in (info.bundle, info.artifact_file)):
        raise GateError(f"{path} is damaged: a name holds a null byte")
