"""Several stores as one: the parts of a collection give the bytes that one run would have given."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mio_export.console.progress import Progress
from mio_export.embedding.partition import num_files_of
from mio_export.embedding.pipeline import StageTimer
from mio_export.embedding.store_writer import StoreWriter
from mio_export.errors import MioError, SpaceError, UsageError
from mio_export.files import behind_links, staged_folder
from mio_export.store import (
    DUPLICATE,
    LOCK,
    OK,
    Row,
    Shard,
    Snapshot,
    Span,
    StoreInfo,
    Vector,
    latest_rows,
    locked,
    shared_lock,
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
        lines = [f"{out}: {stores}, {self.num_files:,} files, {self.num_ok:,} embedded, {self.num_failed:,} failed"]
        if len(self.info.spans) > 1:
            lines.append(f"different versions computed its vectors; which ones: mio inspect {out}")
        return lines


def merge(parts: Sequence[str | Path], out: str | Path, *, progress: Progress | None = None) -> MergeResult:
    """Merge embedding stores into a new one.

    All parts of a collection (``embed`` with ``shard``) give the bytes of one run over all of it. Stores of different
    collections may be merged too, if no key is in two of them. The stores given stay as they are, and may lie where
    nothing can be written.

    Args:
        parts: folders of stores.
        out: the new store's folder; it must not exist, or be empty. It appears whole or not at all.
        progress: is told how far the work is.

    Raises:
        UsageError: a folder is no store; a part is missing, not finished, there twice, or of another collection or
            other settings; a key is in two stores; ``out`` holds something.
        SpaceError: the stores, or a shard in one, hold vectors of different spaces, artifacts, precisions, decode modes
            or runtimes.
        GateError: a store is damaged.
        MioError: another process writes to one of the stores, or to ``out``.
    """
    folders, out, progress = [Path(part) for part in parts], behind_links(Path(out)), progress or Progress()
    if not folders:
        raise UsageError("nothing to merge; name the folders of embedding stores")
    _check_free(out)
    with ExitStack() as stack:
        for folder in dict.fromkeys(folder.resolve() for folder in folders):
            stack.enter_context(shared_lock(folder))
        snapshots = [Snapshot(folder) for folder in folders]
        infos = [snapshot.info for snapshot in snapshots]
        _check_identity(folders, infos)
        rows = [list(latest_rows(snapshot).values()) for snapshot in snapshots]
        shards = [(snapshot, shard) for snapshot in snapshots for shard in snapshot.shards]
        if any(info.part for info in infos):
            _check_parts(folders, infos, rows)
            shards.sort(key=lambda pair: pair[1].number)
        else:
            _check_keys(folders, rows)
        info = replace(infos[0], part=None, spans=_spans(shards))
        with _reserved(out):
            _write(out, info, snapshots, shards, progress)
    merged = [row for found in rows for row in found]
    num_ok = sum(row.has_vector for row in merged)
    return MergeResult(
        info=info, num_stores=len(folders), num_files=len(merged), num_ok=num_ok, num_failed=len(merged) - num_ok
    )


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


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(path.name != LOCK for path in out.iterdir())):
        raise UsageError(f"{out} exists; choose another -o")


@contextmanager
def _reserved(out: Path) -> Iterator[None]:
    """Hold the lock of a folder that is to be filled, so that nobody else begins a store there; undone on an error."""
    is_new = not out.exists()
    with locked(out):
        try:
            _check_free(out)  # another process may have been faster
            yield
        except BaseException:
            if is_new and [path.name for path in out.iterdir()] == [LOCK]:
                (out / LOCK).unlink()
                out.rmdir()
            raise


def _spans(shards: Sequence[tuple[Snapshot, Shard]]) -> tuple[Span, ...]:
    """Return which versions computed the merged shards, which get new numbers."""
    versions = [snapshot.info.versions_of(shard.number) for snapshot, shard in shards]
    return tuple(
        Span(first_shard=number, versions=held)
        for number, held in enumerate(versions)
        if number == 0 or held != versions[number - 1]
    )


def _write(
    out: Path,
    info: StoreInfo,
    snapshots: Sequence[Snapshot],
    shards: Sequence[tuple[Snapshot, Shard]],
    progress: Progress,
) -> None:
    """Write the new store beside its place, and put it there at the end.

    The lock of the folder that is there now goes with it, so the new one is locked as well until all is done.
    """
    with ExitStack() as until_done, staged_folder(out) as staged:
        until_done.enter_context(locked(staged))
        write_info(staged, info)
        with (
            StoreWriter(staged, info, StageTimer()) as writer,
            progress.task("merging", len(shards), unit="shards") as task,
        ):
            for snapshot, shard in shards:
                _append(snapshot, shard, writer)
                task.advance()
        for snapshot in snapshots:
            if not snapshot.holds():
                raise MioError(f"{snapshot.folder} changed while it was merged; once its writer is done, try again")


def _append(snapshot: Snapshot, shard: Shard, writer: StoreWriter) -> None:
    """Append a shard; which of its files are duplicates is decided again."""
    rows, values = snapshot.read_shard(shard)
    vectors: dict[str, Vector] = {}
    for row, vector in zip(rows, values, strict=True):
        if row.sha256 is not None and row.has_vector and row.sha256 not in writer:
            vectors.setdefault(row.sha256, vector)
    writer.append(
        [replace(row, status=OK, reason=None) if row.status == DUPLICATE else row for row in rows],
        vectors,
    )
