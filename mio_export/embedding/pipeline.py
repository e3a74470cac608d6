"""From files to vectors: decode in threads, a bounded number ahead, and embed in full batches, each content once."""

import hashlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from mio_export.embedding.cache import Cache
from mio_export.embedding.lane import Lane
from mio_export.errors import MioError
from mio_export.preprocess import DecodeError, Pixels, Preprocess
from mio_export.progress import Task
from mio_export.runtimes import Runtime
from mio_export.runtimes.base import Embeddings
from mio_export.sources import SourceFile
from mio_export.store import FAILED, OK, Row, Vector


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


class Limits:
    """Where the time of a run goes."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    def add(self, what: str, seconds: float) -> None:
        """Take down time of the run (``wait``, ``infer``, ``write``) or of its threads (``read``, ``decode``)."""
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
    """What turns files into rows and vectors with one runtime and one pool of decoding threads."""

    def __init__(
        self,
        runtime: Runtime,
        preprocess: Preprocess,
        pool: ThreadPoolExecutor,
        *,
        batch_size: int,
        scaled: bool,
        limits: Limits,
    ) -> None:
        self._limits = limits
        self._runtime, self._preprocess, self._pool = runtime, preprocess, pool
        self._batch_size, self._scaled = batch_size, scaled
        self._window = 2 * (batch_size + pool._max_workers)

    def embed(
        self,
        files: Sequence[SourceFile],
        *,
        is_known: Callable[[str], bool] = lambda sha256: False,
        cache: Cache | None = None,
        task: Task | None = None,
    ) -> Embedded:
        """Embed files in full batches, in their order.

        Args:
            files: to be read.
            is_known: whether the vector of a content, by its sha256, is there already; asked by threads.
            cache: gives vectors that need not be computed.
            task: is told of each file.

        Raises:
            MioError: the runtime gave NaN or infinite values.
        """
        found = Embedded()
        seen: set[str] = set()
        batch: dict[str, Pixels] = {}
        with Lane(self._runtime, self._batch_size) as lane:
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
                    self._take(lane, lane.send(batch), found)
                    batch = {}
                if task is not None:
                    task.advance(failed=row.status == FAILED, limited_by=self._limits.bottleneck)
            if batch:
                self._take(lane, lane.send(batch), found)
            self._take(lane, lane.rest(), found)
        return found

    def _take(self, lane: Lane, done: Iterable[tuple[list[str], Embeddings]], found: Embedded) -> None:
        for contents, vectors in done:
            if not np.isfinite(vectors).all():
                name = type(self._runtime).__name__
                raise MioError(f"{name} gave NaN or infinite embeddings; prove the bundle again: mio verify --images")
            found.vectors |= dict(zip(contents, vectors, strict=True))
            found.computed += contents
        self._limits.add("infer", lane.waited_s)
        lane.waited_s = 0.0

    def _decode_ahead(
        self, files: Sequence[SourceFile], is_known: Callable[[str], bool], cache: Cache | None
    ) -> Iterator[Decoded]:
        pending: deque[Future[Decoded]] = deque()
        for file in files:
            pending.append(
                self._pool.submit(decode, file, self._preprocess, scaled=self._scaled, is_known=is_known, cache=cache)
            )
            if len(pending) >= self._window:
                yield self._next(pending)
        while pending:
            yield self._next(pending)

    def _next(self, pending: deque[Future[Decoded]]) -> Decoded:
        start = time.perf_counter()
        decoded = pending.popleft().result()
        self._limits.add("wait", time.perf_counter() - start)
        self._limits.add("read", decoded.read_s)
        self._limits.add("decode", decoded.decode_s)
        return decoded


def decode(
    file: SourceFile,
    preprocess: Preprocess,
    *,
    scaled: bool = False,
    is_known: Callable[[str], bool] = lambda sha256: False,
    cache: Cache | None = None,
) -> Decoded:
    """Read and decode one file; what goes wrong with it is its row's reason."""
    size, mtime_ns, sha256 = file.size, file.mtime_ns, None
    pixels = vector = None
    stage, reason = "read" if file.problem else None, file.problem
    start = read = time.perf_counter()
    if reason is None:
        try:
            data, mtime_ns = file.read()
            size, sha256 = len(data), hashlib.sha256(data).hexdigest()
            read = time.perf_counter()
            if not is_known(sha256):
                vector = cache.get(sha256) if cache else None
                pixels = preprocess.decode(data, scaled=scaled) if vector is None else None
        except OSError as error:
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
