"""``embed``: sources of images into an embedding store, one row for every file, resumable at any moment."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mio_export.bundle import Bundle, load_bundle
from mio_export.embedding.choices import fastest, settle_decoding
from mio_export.embedding.originals import Originals
from mio_export.embedding.pipeline import Limits, decode_ahead, embed_shard
from mio_export.errors import GateError, MioError, SpaceError, UsageError
from mio_export.progress import Progress
from mio_export.runtimes import Choice, choose
from mio_export.runtimes.devices import num_threads
from mio_export.runtimes.registry import open_choice
from mio_export.sources import Listing, SourceFile, list_sources, named
from mio_export.store import (
    DUPLICATE,
    FAILED,
    STORE,
    Row,
    StoreInfo,
    locked,
    next_shard,
    prune,
    read_info,
    read_rows,
    shard_paths,
    write_info,
    write_shard,
)

BATCH_SIZE = 32
SHARD_SIZE = 4096


@dataclass(frozen=True, kw_only=True)
class EmbedResult:
    """What a run did, and what the store now holds of the files that were found."""

    info: StoreInfo
    num_files: int
    """Files found in the source."""
    num_ok: int
    """Of them, those with an embedding, duplicates included."""
    num_duplicates: int
    """Of them, those with the bytes of another file; they were not computed."""
    num_failed: int
    """Of them, those that could not be read; the store has the reasons."""
    num_embedded: int
    """Files that this run read, good and bad."""
    num_vanished: int
    """Keys in the store whose files are gone."""
    num_pruned: int
    """Of those, keys that this run removed."""
    notes: tuple[str, ...]
    """What else a person should know, a line each."""

    def summary(self, out: Path) -> list[str]:
        """Return what happened, in words."""
        lines = [f"{out}: {self.num_files:,} files, {self.num_ok:,} embedded, {self.num_failed:,} failed"]
        lines.append(f"this run worked on {self.num_embedded:,}" if self.num_embedded else "nothing was left to do")
        if self.num_duplicates:
            lines.append(f"{self.num_duplicates:,} have the bytes, and so the vector, of another file")
        if self.num_failed and self.num_ok:
            lines.append(f"why files failed: mio inspect {out}; to try them again, add --retry-failed")
        if self.num_pruned:
            lines.append(f"{self.num_pruned:,} rows of files that are gone were removed")
        elif self.num_vanished:
            lines.append(f"{self.num_vanished:,} rows belong to files that are gone; --prune removes them")
        return lines


def embed(
    bundle: str | Path,
    source: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    runtime: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    batch_size: int | None = None,
    shard_size: int | None = None,
    decode: str = "auto",
    max_failures: str | None = None,
    retry_failed: bool = False,
    prune_vanished: bool = False,
    progress: Progress | None = None,
) -> EmbedResult:
    """Embed every image of a source, or of several, into a store.

    The same call on the same ``out`` resumes: files that have a row with the same size and time are not read again, new
    and changed ones get rows in new shards. What ``auto`` chose the first time is kept.

    Args:
        bundle: the bundle's path.
        source: a folder, list, archive or URL as ``list_sources`` takes it, or several; a URL is text, not a path.
        out: the store's folder.
        runtime: ``auto``: the fastest proved artifact, measured now; or a name in ``runtimes.BACKENDS``.
        precision: ``auto``: fp32; or another that the bundle has proved.
        device: ``auto``, ``cpu``, ``cuda``, or ``tensorrt`` of ONNX Runtime.
        batch_size: images embedded at once, at most the bundle's largest; None: 32, or what the store has.
        shard_size: rows in a shard; None: 4,096, or what the store has.
        decode: ``full``; ``scaled``: large JPEGs at a fraction of their size, several times faster; ``auto``: scaled if
            that keeps the embeddings of a sample of the files.
        max_failures: how many files may fail, a number or a share such as ``5%``; None: all but one.
        retry_failed: also try again the files that failed before.
        prune_vanished: remove the rows of files that are gone.
        progress: is told how far the work is.

    Raises:
        UsageError: an argument is not allowed, or differs from what the store was begun with, or a source is missing.
        MissingBackendError: a URL needs a package that is not installed.
        GateError: more files failed than may; the store holds what was done.
        SpaceError: the store holds vectors of another space, artifact, precision or decode mode.
        MioError: the source holds no images, another process writes to the store, or something is to be pruned while a
            part of the source cannot be listed.
    """
    opened, out = load_bundle(bundle), Path(out)
    specs = [source] if isinstance(source, str | Path) else list(source)
    progress = progress or Progress()
    allowed = _failure_limit(max_failures)
    listing = list_sources(specs)
    if not listing.files:
        raise MioError("\n".join([f"no images found in {named(specs)}", *listing.notes()]))
    if prune_vanished and listing.unlisted:
        raise MioError(
            "\n".join([f"nothing is pruned while parts of {named(specs)} cannot be listed", *listing.unlisted])
        )
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; -o names a folder")
    with locked(out):
        info, choice = _begin(
            opened, out, listing.files, runtime, precision, device, batch_size, shard_size, decode, progress
        )
        seen = _by_key(out)
        todo = [file for file in listing.files if _needs_work(file, seen.get(file.key), retry_failed)]
        if todo:
            _embed_files(opened, choice, todo, info, out, progress)
            seen = _by_key(out)
        found = frozenset(file.key for file in listing.files)
        num_pruned = prune(out, found) if prune_vanished else 0
    result = _result(info, listing, seen, len(todo), num_pruned)
    if allowed is not None and result.num_failed > allowed(result.num_files):
        raise GateError(
            f"{result.num_failed:,} of {result.num_files:,} files failed, more than {max_failures};"
            f" {out} holds the others, and the reasons: mio inspect {out}"
        )
    return result


def _failure_limit(text: str | None) -> Callable[[int], float] | None:
    if text is None:
        return None
    number, share = text.removesuffix("%"), text.endswith("%")
    try:
        value = float(number) if share else int(number)
    except ValueError:
        value = -1
    if value < 0 or (share and value > 100):
        raise UsageError(f"max_failures must be a number of files or a share such as 5%, got {text!r}")
    return lambda total: total * value / 100 if share else value


def _begin(
    bundle: Bundle,
    out: Path,
    files: Sequence[SourceFile],
    runtime: str,
    precision: str,
    device: str,
    batch_size: int | None,
    shard_size: int | None,
    decode: str,
    progress: Progress,
) -> tuple[StoreInfo, Choice]:
    """Settle every choice: those of the store if there is one, else the given ones, written down at once."""
    if decode not in ("auto", "full", "scaled"):
        raise UsageError(f"decode must be auto, full or scaled, got {decode!r}")
    stored = read_info(out)
    if stored is None and shard_paths(out):
        raise GateError(f"{out} holds shards but no {STORE} to say what they are; choose another -o")
    if stored is not None:
        runtime = stored.runtime if runtime == "auto" else runtime
        precision = stored.precision if precision == "auto" else precision
        device = stored.device if device == "auto" else device
        batch_size = stored.batch_size if batch_size is None else batch_size
        shard_size = stored.shard_size if shard_size is None else shard_size
        decode = stored.decode if decode == "auto" else decode
        if stored.space != bundle.manifest.space:
            raise SpaceError(
                f"{out} holds vectors of another embedding space ({stored.bundle}, {stored.space[:12]}…)"
                f" than {bundle.path} ({bundle.manifest.space[:12]}…); choose another -o"
            )
    if runtime == "auto" and precision in ("auto", "fp32"):
        choice = fastest(bundle, device=device, progress=progress)
    else:
        choice = choose(bundle, runtime, precision=precision, device=device)
    info = StoreInfo(
        bundle=bundle.manifest.name,
        space=bundle.manifest.space,
        artifact_file=choice.file,
        artifact_sha256=choice.sha256,
        precision=choice.precision,
        decode=settle_decoding(decode, bundle, choice, files, progress=progress),
        runtime=choice.runtime,
        device=choice.device,
        embedding_dim=bundle.manifest.encoder.embedding_dim,
        normalized=bundle.manifest.encoder.normalize,
        batch_size=min(BATCH_SIZE, bundle.manifest.max_batch) if batch_size is None else batch_size,
        shard_size=SHARD_SIZE if shard_size is None else shard_size,
    )
    _check_sizes(info, bundle)
    if stored is None:
        write_info(out, info)
    else:
        _check_same(stored, info, out)
    return stored or info, choice


def _check_sizes(info: StoreInfo, bundle: Bundle) -> None:
    largest = bundle.manifest.max_batch
    if not 1 <= info.batch_size <= largest:
        raise UsageError(
            f"batch size must be 1 to {largest} (the largest that {bundle.path} was proved at), got {info.batch_size}"
        )
    if info.shard_size < 1:
        raise UsageError(f"shard size must be 1 or more, got {info.shard_size}")


def _check_same(stored: StoreInfo, info: StoreInfo, out: Path) -> None:
    for field in ("artifact_sha256", "precision", "decode"):
        if getattr(stored, field) != getattr(info, field):
            raise SpaceError(
                f"{out} holds vectors of {stored.artifact_file} ({stored.precision}, {stored.artifact_sha256[:12]}…),"
                f" not of {info.artifact_file} ({info.precision}, {info.artifact_sha256[:12]}…); choose another -o"
            )
    for field in ("device", "batch_size", "shard_size"):
        if getattr(stored, field) != getattr(info, field):
            name = f"--{field.replace('_', '-')}"
            raise UsageError(
                f"{out} was begun with {name} {getattr(stored, field)}, got {getattr(info, field)};"
                f" leave {name} out, or choose another -o"
            )


def _by_key(out: Path) -> dict[str, Row]:
    return {row.key: row for row in read_rows(out)}


def _needs_work(file: SourceFile, seen: Row | None, retry_failed: bool) -> bool:
    if seen is None or (seen.size, seen.mtime_ns) != (file.size, file.mtime_ns):
        return True
    return retry_failed and seen.status == FAILED


def _embed_files(
    bundle: Bundle, choice: Choice, files: Sequence[SourceFile], info: StoreInfo, out: Path, progress: Progress
) -> None:
    progress.line(
        f"{choice.runtime} {choice.precision} on {choice.device} ({choice.file}), {len(files):,} files to embed"
    )
    workers = num_threads()
    originals, limits = Originals(out), Limits()
    with (
        open_choice(bundle, choice) as runtime,
        ThreadPoolExecutor(workers) as pool,
        progress.task("embedding", len(files)) as task,
    ):
        try:
            for start in range(0, len(files), info.shard_size):
                decoded = decode_ahead(
                    files[start : start + info.shard_size],
                    bundle.manifest.preprocess,
                    pool,
                    originals=originals,
                    scaled=info.decode == "scaled",
                    window=2 * (info.batch_size + workers),
                )
                rows, vectors = embed_shard(decoded, runtime, info, originals, limits, task)
                path = next_shard(out)
                write_shard(path, info, rows, vectors)
                originals.commit(path, rows)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _result(info: StoreInfo, listing: Listing, seen: dict[str, Row], num_embedded: int, num_pruned: int) -> EmbedResult:
    found = {file.key for file in listing.files}
    num_ok = sum(1 for key in found if seen[key].has_vector)
    return EmbedResult(
        info=info,
        num_files=len(found),
        num_ok=num_ok,
        num_duplicates=sum(1 for key in found if seen[key].status == DUPLICATE),
        num_failed=len(found) - num_ok,
        num_embedded=num_embedded,
        num_vanished=len(seen.keys() - found),
        num_pruned=num_pruned,
        notes=tuple(listing.notes()),
    )
