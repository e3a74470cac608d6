"""``embed``: sources of images into an embedding store, one row for every file, resumable at any moment."""

import math
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from mio_export.bundle import load_bundle
from mio_export.console.progress import Progress, Task
from mio_export.decoding import Decoder, within
from mio_export.embedding.agreement import continued
from mio_export.embedding.cache import Cache
from mio_export.embedding.options import EmbedOptions, resolved
from mio_export.embedding.partition import files_of
from mio_export.embedding.pipeline import Embedded, Embedder, StageTimer
from mio_export.embedding.ray_engine import check_engine, embedded_by_ray
from mio_export.embedding.status import StoreStatus
from mio_export.embedding.store_writer import StoreWriter
from mio_export.errors import GateError, MioError, UsageError
from mio_export.files import behind_links
from mio_export.limits import Limits
from mio_export.runtimes import Choice, Selected
from mio_export.runtimes.backends import NAMED_ONLY
from mio_export.runtimes.devices import num_threads
from mio_export.sources import Listing, SourceFile, list_sources, named
from mio_export.store import StoreInfo, locked, prune


@dataclass(frozen=True, kw_only=True)
class EmbedResult:
    """What a run did, and what the store now holds of the files that were found."""

    info: StoreInfo
    num_files: int
    """Files found in the source, of a part those that are its own."""
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
        if self.info.part:
            lines.append(f"this is part {self.info.part}; once all are done: mio merge PART... -o OUT")
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
    shard: str | None = None,
    cache: str | Path | None = None,
    engine: str = "local",
    address: str | None = None,
    max_failures: str | None = None,
    retry_failed: bool = False,
    rehash: bool = False,
    prune_vanished: bool = False,
    limits: Limits | None = None,
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
        shard: ``I/N``: only the I-th of N parts of the collection; ``merge`` makes one store of all. Every part must
            choose alike, so ``auto`` takes the first runtime that is installed and proved, without measuring.
        cache: a folder that keeps vectors by content, for other stores of the same artifact; of the local engine.
        engine: ``local``: this process; or ``ray``: the processes of a Ray cluster, to the same rows.
        address: of a Ray cluster to join; None: one of this machine alone.
        max_failures: how many files may fail, a number or a share such as ``5%``; None: all but one.
        retry_failed: also try again the files that failed before.
        rehash: also read every file whose size and time are as before, and embed it again if its bytes are not.
        prune_vanished: remove the rows of files that are gone.
        limits: what one file may cost: bytes, pixels and seconds; one beyond them fails. None: the defaults.
        progress: is told how far the work is.

    Raises:
        UsageError: an argument is not allowed, or differs from what the store was created with, or a source is missing.
        MissingBackendError: a URL, or the engine, needs a package that is not installed.
        GateError: more files failed than may; the store holds what was done.
        SpaceError: the store holds vectors of another space, artifact, precision, decode mode or runtime; or other
            versions computed them, and those that run here do not agree with them.
        OutOfMemoryError: there is not enough memory for one file; what was done is kept.
        MioError: the source holds no images, another process writes to the store, or something is to be pruned while a
            part of the source cannot be listed.
    """
    opened, out = load_bundle(bundle), behind_links(Path(out))
    specs = [source] if isinstance(source, str | Path) else list(source)
    progress = progress or Progress()
    options = EmbedOptions(
        runtime=runtime,
        precision=precision,
        device=device,
        batch_size=batch_size,
        shard_size=shard_size,
        decode=decode,
        shard=shard,
        cache=None if cache is None else Path(cache),
        engine=engine,
        address=address,
        limits=limits or Limits(),
    )
    within(opened.manifest.preprocess, options.limits)
    check_engine(engine, address=address, cache=cache)
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
    with locked(out), resolved(opened, out, listing.files, options, progress) as (info, selected):
        files = files_of(info.part, listing.files, info.shard_size)
        standing = StoreStatus(files, out, info)
        todo = standing.todo(
            retry_failed=retry_failed,
            rehash=rehash,
            progress=progress,
            max_bytes=options.limits.max_file_bytes,
        )
        if todo:
            _check_named(selected.choice, runtime, out)
            info = continued(selected, info, out, files, progress, limits=options.limits)
            _embed_files(selected, todo, info, out, options, progress)
            standing = StoreStatus(files, out, info)
        num_pruned = prune(out, frozenset(file.key for file in files)) if prune_vanished else 0
    result = _result(info, len(files), standing, listing, len(todo), num_pruned)
    if allowed is not None and result.num_failed > allowed(result.num_files):
        raise GateError(
            f"{result.num_failed:,} of {result.num_files:,} files failed, more than {max_failures};"
            f" {out} holds the others, and the reasons: mio inspect {out}"
        )
    return result


def _check_named(choice: Choice, runtime: str, out: Path) -> None:
    """Refuse to open a format that may hold code, unless it is named in this very call."""
    if choice.runtime in NAMED_ONLY and runtime == "auto":
        raise UsageError(
            f"{out} was created with {choice.runtime}, whose files may hold code and run only when they are named;"
            f" if you trust the bundle, add --runtime {choice.runtime}"
        )


def _failure_limit(text: str | None) -> Callable[[int], float] | None:
    if text is None:
        return None
    number, share = text.removesuffix("%"), text.endswith("%")
    try:
        value = float(number) if share else int(number)
    except ValueError:
        value = -1
    if not 0 <= value <= (100 if share else math.inf):
        raise UsageError(f"max_failures must be a number of files or a share such as 5%, got {text!r}")
    return lambda total: total * value / 100 if share else value


def _embed_files(
    selected: Selected,
    files: Sequence[SourceFile],
    info: StoreInfo,
    out: Path,
    options: EmbedOptions,
    progress: Progress,
) -> None:
    choice = selected.choice
    progress.line(
        f"{choice.runtime} {choice.precision} on {choice.device} ({choice.file}), {len(files):,} files to embed"
    )
    timer = StageTimer()
    shards = [files[start : start + info.shard_size] for start in range(0, len(files), info.shard_size)]
    with StoreWriter(out, info, timer) as writer, progress.task("embedding", len(files)) as task:
        if options.engine == "ray":
            selected.close()  # the workers open their own, and a GPU may not hold both
            done = embedded_by_ray(selected.bundle, choice, info, shards, options=options, task=task)
        else:
            done = _embedded_here(selected, info, shards, writer, options, timer, task)
        with closing(done):
            for embedded in done:
                writer.append(embedded.rows, embedded.vectors)


def _embedded_here(
    selected: Selected,
    info: StoreInfo,
    shards: Sequence[Sequence[SourceFile]],
    writer: StoreWriter,
    options: EmbedOptions,
    timer: StageTimer,
    task: Task,
) -> Generator[Embedded]:
    """Yield each shard embedded by this process; what ``writer`` or a cache holds is not computed."""
    kept = Cache(options.cache, info) if options.cache is not None else None
    preprocess = selected.bundle.manifest.preprocess
    with (
        ThreadPoolExecutor(num_threads()) as pool,
        Decoder(preprocess, scaled=info.decode == "scaled", limits=options.limits) as decoder,
    ):
        embedder = Embedder(selected.runtime, decoder, pool, batch_size=info.batch_size, timer=timer)
        try:
            for shard in shards:
                embedded = embedder.embed(shard, is_known=writer.__contains__, cache=kept, task=task)
                yield embedded
                if kept:
                    kept.put({sha256: embedded.vectors[sha256] for sha256 in embedded.computed})
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            if kept:
                kept.close()


def _result(
    info: StoreInfo, num_files: int, standing: StoreStatus, listing: Listing, num_embedded: int, num_pruned: int
) -> EmbedResult:
    return EmbedResult(
        info=info,
        num_files=num_files,
        num_ok=num_files - standing.num_failed,
        num_duplicates=standing.num_duplicates,
        num_failed=standing.num_failed,
        num_embedded=num_embedded,
        num_vanished=standing.num_vanished,
        num_pruned=num_pruned,
        notes=tuple(listing.notes()),
    )
