"""From files to vectors: decode in threads, a bounded number ahead, and embed in full batches, each content once."""

import hashlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from mio_export.console.progress import Task
from mio_export.decoding import Decoder
from mio_export.embedding.cache import Cache
from mio_export.embedding.computing import ImageMemoryError
from mio_export.embedding.inference_queue import InferenceQueue
from mio_export.errors import OutOfMemoryError
from mio_export.memory import lacks_memory
from mio_export.preprocess import DecodeError, Pixels
from mio_export.runtimes import Runtime
from mio_export.runtimes.base import Embeddings
from mio_export.sources import SourceFile
from mio_export.store import FAILED, OK, Row, Vector

_NOT_FINITE = "its embedding has NaN or infinite values, computed alone too"


class Decodes(Protocol):
    """What turns the bytes of a file into pixels: a ``Decoder``, or a contract without limits."""

    def decode(self, data: bytes) -> Pixels:
        """Return uint8 pixels, shape (H, W, C).

        Raises:
            DecodeError: the file is at fault.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """One file, read and decoded."""

    row: Row
    """``ok`` or ``failed``."""
    pixels: Pixels | None = None
    """None if it failed, or if the vector of its content is there already."""
    vector: Vector | None = None
    """What a cache has for its content, shape (D,)."""
    read_s: float
    decode_s: float


@dataclass(kw_only=True)
class Embedded:
    """Some files, embedded: a row for each, and a vector for each content that was not known before."""

    rows: list[Row] = field(default_factory=list)
    vectors: dict[str, Vector] = field(default_factory=dict)
    """By sha256 of the content, shape (D,)."""
    computed: list[str] = field(default_factory=list)
    """The contents whose vectors a runtime gave, not a cache."""


class StageTimer:
    """Where the time of a run goes."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    def add(self, what: str, seconds: float) -> None:
        """Record time of the run (``wait``, ``infer``, ``write``) or of its threads (``read``, ``decode``)."""
        self._seconds[what] += seconds

    @property
    def bottleneck(self) -> str:
        """``read``, ``decode``, ``infer`` or ``write``; empty until a second of work is done."""
        run = {what: self._seconds[what] for what in ("wait", "infer", "write")}
        if sum(run.values()) < 1:
            return ""
        longest = max(run, key=lambda what: run[what])
        if longest == "wait":
            return "decode" if self._seconds["decode"] >= self._seconds["read"] else "read"
        return longest


class Embedder:
    """What turns files into rows and vectors with one runtime, one decoder and one pool of threads.

    Args:
        runtime: what computes.
        decoder: what decodes; it also knows how many bytes a file may have.
        pool: the threads that read and decode.
        batch_size: images computed at once.
        timer: records where the time goes.
    """

    def __init__(
        self, runtime: Runtime, decoder: Decoder, pool: ThreadPoolExecutor, *, batch_size: int, timer: StageTimer
    ) -> None:
        self._timer = timer
        self._runtime, self._decoder, self._pool = runtime, decoder, pool
        self._batch_size = batch_size
        self._window = 2 * (batch_size + pool._max_workers)
        self._failed: set[str] = set()

    def embed(
        self,
        files: Sequence[SourceFile],
        *,
        is_known: Callable[[str], bool] = lambda sha256: False,
        cache: Cache | None = None,
        task: Task | None = None,
    ) -> Embedded:
        """Embed files in full batches, in their order.

        A content whose embedding is not finite fails, with all files that hold it, for as long as this object lives.

        Args:
            files: to be read.
            is_known: whether the vector of a content, by its sha256, is there already; asked by threads.
            cache: gives vectors that need not be computed.
            task: is told of each file.

        Raises:
            OutOfMemoryError: there is not enough memory for one file, though it was tried alone; the message names it.
        """
        found = Embedded()
        try:
            self._embed_into(found, files, is_known, cache, task)
        except ImageMemoryError as error:
            key = next(row.key for row in found.rows if row.sha256 == error.name)
            raise OutOfMemoryError(
                f"there is not enough memory to embed {key}, though it was tried alone; what was done is kept: free"
                " memory, then run it again to resume"
            ) from error
        num_failed = self._fail(found)
        if task is not None and num_failed:
            task.advance(0, failed=num_failed)
        return found

    def _embed_into(
        self,
        found: Embedded,
        files: Sequence[SourceFile],
        is_known: Callable[[str], bool],
        cache: Cache | None,
        task: Task | None,
    ) -> None:
        seen: set[str] = set()
        batch: dict[str, Pixels] = {}
        with InferenceQueue(self._runtime, self._batch_size) as queue:
            for decoded in self._decode_ahead(files, is_known, cache):
                row, sha256 = decoded.row, decoded.row.sha256
                found.rows.append(row)
                if sha256 is not None and sha256 not in seen:
                    if decoded.vector is not None:
                        found.vectors[sha256] = decoded.vector
                        seen.add(sha256)
                    elif decoded.pixels is not None:
                        batch[sha256] = decoded.pixels
                        seen.add(sha256)
                if len(batch) == self._batch_size:
                    self._take(queue, queue.submit(batch), found)
                    batch = {}
                if task is not None:
                    task.advance(failed=row.status == FAILED, limited_by=self._timer.bottleneck)
            if batch:
                self._take(queue, queue.submit(batch), found)
            self._take(queue, queue.drain(), found)

    def _fail(self, found: Embedded) -> int:
        """Turn the rows of contents whose embedding is not finite into failed ones; return how many there are."""
        places = [p for p, row in enumerate(found.rows) if row.status == OK and row.sha256 in self._failed]
        for place in places:
            found.rows[place] = replace(found.rows[place], status=FAILED, stage="embed", reason=_NOT_FINITE)
        return len(places)

    def _take(self, queue: InferenceQueue, done: Iterable[tuple[list[str], Embeddings]], found: Embedded) -> None:
        for contents, vectors in done:
            for sha256, vector in zip(contents, vectors, strict=True):
                if np.isfinite(vector).all():
                    found.vectors[sha256] = vector
                    found.computed.append(sha256)
                else:
                    self._failed.add(sha256)
        self._timer.add("infer", queue.waited_s)
        queue.waited_s = 0.0

    def _decode_ahead(
        self, files: Sequence[SourceFile], is_known: Callable[[str], bool], cache: Cache | None
    ) -> Iterator[Decoded]:
        def submit(file: SourceFile) -> Future[Decoded]:
            return self._pool.submit(
                decode,
                file,
                self._decoder,
                max_bytes=self._decoder.limits.max_file_bytes,
                is_known=lambda sha256: sha256 in self._failed or is_known(sha256),
                cache=cache,
            )

        pending: deque[tuple[SourceFile, Future[Decoded]]] = deque()
        for file in files:
            pending.append((file, submit(file)))
            if len(pending) >= self._window:
                yield self._next(pending, submit)
        while pending:
            yield self._next(pending, submit)

    def _next(
        self, pending: deque[tuple[SourceFile, Future[Decoded]]], submit: Callable[[SourceFile], Future[Decoded]]
    ) -> Decoded:
        start = time.perf_counter()
        file, future = pending.popleft()
        try:
            decoded = future.result()
        except MemoryError:
            wait([other for _, other in pending])  # what they hold is free then
            decoded = _alone(file, submit)
        self._timer.add("wait", time.perf_counter() - start)
        self._timer.add("read", decoded.read_s)
        self._timer.add("decode", decoded.decode_s)
        return decoded


def _alone(file: SourceFile, submit: Callable[[SourceFile], Future[Decoded]]) -> Decoded:
    """Read and decode a file while no other is worked on."""
    try:
        return submit(file).result()
    except MemoryError as error:
        reason = f" ({error})" if str(error) else ""
        raise OutOfMemoryError(
            f"there is not enough memory to read and decode {file.key}{reason}, though it was tried alone; what was"
            " done is kept: free memory or allow less (--max-pixels, --max-file-bytes), then run it again to resume"
        ) from error


def decode(
    file: SourceFile,
    decoder: Decodes,
    *,
    max_bytes: int | None = None,
    is_known: Callable[[str], bool] = lambda sha256: False,
    cache: Cache | None = None,
) -> Decoded:
    """Read and decode one file; what goes wrong with it is its row's reason.

    Raises:
        MemoryError: the machine has not enough memory, which is not the file's fault.
    """
    size, mtime_ns, sha256 = file.size, file.mtime_ns, None
    pixels = vector = None
    stage, reason = "read" if file.problem else None, file.problem
    start = read = time.perf_counter()
    if reason is None:
        try:
            data, mtime_ns = file.read(max_bytes)
            size, sha256 = len(data), hashlib.sha256(data).hexdigest()
            read = time.perf_counter()
            if not is_known(sha256):
                vector = cache.get(sha256) if cache else None
                pixels = decoder.decode(data) if vector is None else None
        except OSError as error:
            if lacks_memory(error):
                raise MemoryError(error.strerror) from error
            stage, reason = "read", f"cannot be read: {error.strerror or error}"
        except DecodeError as error:
            stage, reason = "decode", str(error)
    row = Row(
        key=file.key,
        size=size,
        mtime_ns=mtime_ns,
        sha256=sha256,
        status=OK if reason is None else FAILED,
        stage=stage,
        reason=reason,
    )
    return Decoded(row=row, pixels=pixels, vector=vector, read_s=read - start, decode_s=time.perf_counter() - read)
