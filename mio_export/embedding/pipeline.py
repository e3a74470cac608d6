"""From files to vectors: decode in threads, a bounded number ahead, and embed in full batches, each content once."""

import hashlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from mio_export.embedding.originals import Originals
from mio_export.errors import MioError
from mio_export.preprocess import DecodeError, Pixels, Preprocess
from mio_export.progress import Task
from mio_export.runtimes import Runtime
from mio_export.sources import SourceFile
from mio_export.store import DUPLICATE, FAILED, OK, Row, StoreInfo


def decode_ahead(
    files: Sequence[SourceFile],
    preprocess: Preprocess,
    pool: ThreadPoolExecutor,
    *,
    originals: Originals,
    scaled: bool,
    window: int,
) -> Iterator[tuple[Row, Pixels | None]]:
    """Decode files in their order, at most ``window`` ahead of whoever takes them; known ones are only read."""
    pending: deque[Future[tuple[Row, Pixels | None]]] = deque()
    for file in files:
        pending.append(pool.submit(decode, file, preprocess, originals=originals, scaled=scaled))
        if len(pending) >= window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def decode(
    file: SourceFile, preprocess: Preprocess, *, originals: Originals | None = None, scaled: bool = False
) -> tuple[Row, Pixels | None]:
    """Read and decode one file; what goes wrong with it is its row's reason.

    No pixels and no reason: its content is known, so that nothing is to be computed.
    """
    size, mtime_ns, sha256 = file.size, file.mtime_ns, None
    pixels, stage, reason = None, "read" if file.problem else None, file.problem
    if reason is None:
        try:
            data, mtime_ns = file.read()
            size, sha256 = len(data), hashlib.sha256(data).hexdigest()
            if originals is None or sha256 not in originals:
                pixels = preprocess.decode(data, scaled=scaled)
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
    return row, pixels


class Limits:
    """Where the time of a run went: waiting for decoded images, or inference."""

    def __init__(self) -> None:
        self.waited_s = 0.0
        self.inferred_s = 0.0

    def note(self) -> str:
        """Return what limits the run, once it is worth saying."""
        if self.waited_s + self.inferred_s < 1:
            return ""
        return "limited by " + ("reading and decoding" if self.waited_s > self.inferred_s else "inference")


def embed_shard(
    decoded: Iterator[tuple[Row, Pixels | None]],
    runtime: Runtime,
    info: StoreInfo,
    originals: Originals,
    limits: Limits,
    task: Task,
) -> tuple[list[Row], npt.NDArray[np.float32]]:
    """Embed the readable images of a shard in full batches, of equal ones the first.

    Returns:
        A row for each file, and the vectors of those that have one, in their order.
    """
    rows: list[Row] = []
    batch: list[Pixels] = []
    fresh: list[npt.NDArray[np.float32]] = []
    contents: list[str] = []  # of each row with a vector
    place: dict[str, int] = {}  # of each content that is computed here

    def flush() -> None:
        if batch:
            start = time.perf_counter()
            fresh.append(_finite(runtime.embed(np.stack(batch)), runtime))
            limits.inferred_s += time.perf_counter() - start
            batch.clear()

    start = time.perf_counter()
    for row, pixels in decoded:
        limits.waited_s += time.perf_counter() - start
        if row.status == OK:
            sha256 = row.sha256 or ""  # a file that was read has one
            original = originals.key(sha256)
            if original is None:
                assert pixels is not None
                place[sha256] = len(place)
                originals.begin(sha256, row.key)
                batch.append(pixels)
            elif original != row.key:
                row = replace(row, status=DUPLICATE, reason=f"same bytes as {original}")
            contents.append(sha256)
        rows.append(row)
        if len(batch) == info.batch_size:
            flush()
        task.advance(note=limits.note())
        start = time.perf_counter()
    flush()
    computed = np.concatenate(fresh) if fresh else np.empty((0, info.embedding_dim), np.float32)
    vectors = np.empty((len(contents), info.embedding_dim), np.float32)
    for index, sha256 in enumerate(contents):
        vectors[index] = computed[place[sha256]] if sha256 in place else originals.vector(sha256)
    return rows, vectors


def _finite(vectors: npt.NDArray[np.float32], runtime: Runtime) -> npt.NDArray[np.float32]:
    """Stop before a vector that no proved artifact gives is written."""
    if not np.isfinite(vectors).all():
        raise MioError(
            f"{type(runtime).__name__} gave NaN or infinite embeddings; prove the bundle again: mio verify --images"
        )
    return vectors
