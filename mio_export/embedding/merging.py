"""Several stores as one: the parts of a collection give the bytes that one run would have given."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from mio_export.embedding.parts import num_files_of
from mio_export.embedding.pipeline import Limits
from mio_export.embedding.writer import StoreWriter
from mio_export.errors import SpaceError, UsageError
from mio_export.files import staged_folder
from mio_export.progress import Progress
from mio_export.store import (
    DUPLICATE,
    LOCK,
    OK,
    STORE,
    Row,
    StoreInfo,
    Vector,
    locked,
    read_info,
    read_rows,
    read_shard,
    shard_number,
    shard_paths,
    write_info,
)


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """What a merged store holds."""

    info: StoreInfo
    num_stores: int
    num_files: int
    num_ok: int
    num_failed: int

    def summary(self, out: Path) -> list[str]:
        """Return what was merged, in words."""
        stores = "1 store" if self.num_stores == 1 else f"{self.num_stores:,} stores"
        return [f"{out}: {stores}, {self.num_files:,} files, {self.num_ok:,} embedded, {self.num_failed:,} failed"]


def merge(parts: Sequence[str | Path], out: str | Path, *, progress: Progress | None = None) -> MergeResult:
    """Merge embedding stores into a new one.

    All parts of a collection (``embed`` with ``shard``) give the bytes of one run over all of it. Stores of different
    collections may be merged too, if no key is in two of them. The stores given stay as they are.

    Args:
        parts: folders of stores.
        out: the new store's folder; it must not exist, or be empty. It appears whole or not at all.
        progress: is told how far the work is.

    Raises:
        UsageError: a folder is no store; a part is missing, not finished, there twice, or of another collection or
            other settings; a key is in two stores; ``out`` holds something.
        SpaceError: the stores hold vectors of different spaces, artifacts, precisions or decode modes.
        GateError: a store is damaged.
        MioError: another process writes to one of the stores.
    """
    folders, out, progress = [Path(part) for part in parts], Path(out), progress or Progress()
    if not folders:
        raise UsageError("nothing to merge; name the folders of embedding stores")
    if out.exists() and (not out.is_dir() or any(path.name != LOCK for path in out.iterdir())):
        raise UsageError(f"{out} exists; choose another -o")
    infos = [_info(folder) for folder in folders]
    with ExitStack() as stack:
        for folder in dict.fromkeys(folder.resolve() for folder in folders):
            stack.enter_context(locked(folder))
        rows = [read_rows(folder) for folder in folders]
        _check_identity(folders, infos)
        if any(info.part for info in infos):
            _check_parts(folders, infos, rows)
            paths = sorted((path for folder in folders for path in shard_paths(folder)), key=shard_number)
        else:
            _check_keys(folders, rows)
            paths = [path for folder in folders for path in shard_paths(folder)]
        info = replace(infos[0], part=None)
        out.parent.mkdir(parents=True, exist_ok=True)
        with staged_folder(out) as staged:
            write_info(staged, info)
            with (
                StoreWriter(staged, info, Limits()) as writer,
                progress.task("merging", len(paths), unit="shards") as t,
            ):
                for path in paths:
                    _append(path, writer)
                    t.advance()
    merged = [row for found in rows for row in found]
    num_ok = sum(row.has_vector for row in merged)
    return MergeResult(
        info=info, num_stores=len(folders), num_files=len(merged), num_ok=num_ok, num_failed=len(merged) - num_ok
    )


def _info(folder: Path) -> StoreInfo:
    info = read_info(folder)
    if info is None:
        raise UsageError(f"{folder} is not an embedding store (it holds no {STORE}); make one with: mio embed")
    return info


def _check_identity(folders: Sequence[Path], infos: Sequence[StoreInfo]) -> None:
    for folder, info in zip(folders, infos, strict=True):
        for name, value in info.identity.items():
            if value != infos[0].identity[name]:
                raise SpaceError(
                    f"{folder} and {folders[0]} hold vectors of different {name.replace('_', ' ')}:"
                    f" {value[:12]} and {infos[0].identity[name][:12]}"
                )


def _check_parts(folders: Sequence[Path], infos: Sequence[StoreInfo], rows: Sequence[Sequence[Row]]) -> None:
    by_index: dict[int, Path] = {}
    for folder, info, found in zip(folders, infos, rows, strict=True):
        part, first = info.part, infos[0].part
        if part is None or first is None:
            raise UsageError(f"{folder if part is None else folders[0]} is no part (mio embed --shard), others are")
        if part.count != first.count or part.listing_sha256 != first.listing_sha256:
            raise UsageError(
                f"{folder} and {folders[0]} are parts of different collections: {part} of {part.num_files:,} files and"
                f" {first} of {first.num_files:,}"
            )
        if part.index in by_index:
            raise UsageError(f"{folder} and {by_index[part.index]} are both part {part}")
        by_index[part.index] = folder
        for name in ("runtime", "device", "batch_size", "shard_size"):
            if getattr(info, name) != getattr(infos[0], name):
                raise UsageError(
                    f"{folder} was made with another {name.replace('_', ' ')} than {folders[0]}:"
                    f" {getattr(info, name)}, not {getattr(infos[0], name)}"
                )
        missing = num_files_of(part, info.shard_size) - len(found)
        if missing > 0:
            raise UsageError(f"{folder} is not finished: {missing:,} of its files have no row; run its mio embed again")
    first = infos[0].part
    missing_parts = [str(i) for i in range(1, first.count + 1) if i not in by_index] if first else []
    if missing_parts and first:
        raise UsageError(f"part {', '.join(missing_parts)} of {first.count} is missing")


def _check_keys(folders: Sequence[Path], rows: Sequence[Sequence[Row]]) -> None:
    owner: dict[str, Path] = {}
    for folder, found in zip(folders, rows, strict=True):
        for row in found:
            if row.key in owner:
                raise UsageError(f"{row.key!r} is in both {owner[row.key]} and {folder}")
            owner[row.key] = folder


def _append(path: Path, writer: StoreWriter) -> None:
    """Append a shard; which of its files are duplicates is found out anew."""
    rows, values = read_shard(path)
    vectors: dict[str, Vector] = {}
    for row, vector in zip(rows, values, strict=True):
        if row.sha256 is not None and row.has_vector and row.sha256 not in writer:
            vectors.setdefault(row.sha256, vector)
    writer.append(
        [replace(row, status=OK, reason=None) if row.status == DUPLICATE else row for row in rows],
        vectors,
    )
