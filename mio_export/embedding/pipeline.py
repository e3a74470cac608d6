"""From files to vectors: decode in threads, a bounded number ahead, and embed in full batches."""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from mio_export.errors import MioError
from mio_export.preprocess import DecodeError, Pixels, Preprocess
from mio_export.progress import Task
from mio_export.runtimes import Runtime
from mio_export.sources import SourceFile
from mio_export.store import FAILED, OK, Row, StoreInfo


def decode_ahead(
    files: Sequence[SourceFile], preprocess: Preprocess, pool: ThreadPoolExecutor, *, window: int
) -> Iterator[tuple[Row, Pixels | None]]:
    """Decode files in their order, at most ``window`` ahead of whoever takes them."""
    pending: deque[Future[tuple[Row, Pixels | None]]] = deque()
    for file in files:
        pending.append(pool.submit(_decode, file, preprocess))
        if len(pending) >= window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _decode(file: SourceFile, preprocess: Preprocess) -> tuple[Row, Pixels | None]:
    """Read and decode one file; what goes wrong with it is its row's reason."""
    size, mtime_ns, sha256 = file.size, file.mtime_ns, None
    pixels, reason = None, file.problem
    if reason is None:
        try:
            data, mtime_ns = file.read()
            size, sha256 = len(data), hashlib.sha256(data).hexdigest()
            pixels = preprocess.decode(data)
        except OSError as error:
            reason = f"cannot be read: {error.strerror or error}"
        except DecodeError as error:
            reason = str(error)
    status_text = OK if reason is None else FAILED
    row = Row(key=file.key, size=size, mtime_ns=mtime_ns, sha256=sha256, status=status_text, reason=reason)
    return row, pixels


def embed_shard(
    decoded: Iterator[tuple[Row, Pixels | None]], runtime: Runtime, info: StoreInfo, task: Task
) -> tuple[list[Row], npt.NDArray[np.float32]]:
    """Embed the readable images of a shard in full batches; return a row for each file and the vectors of the good."""
    rows: list[Row] = []
    batch: list[Pixels] = []
    vectors: list[npt.NDArray[np.float32]] = []

    def flush() -> None:
        if batch:
            vectors.append(_finite(runtime.embed(np.stack(batch)), runtime))
            batch.clear()

    for row, pixels in decoded:
        rows.append(row)
        if pixels is not None:
            batch.append(pixels)
        if len(batch) == info.batch_size:
            flush()
        task.advance()
    flush()
    return rows, np.concatenate(vectors) if vectors else np.empty((0, info.embedding_dim), np.float32)


def _finite(vectors: npt.NDArray[np.float32], runtime: Runtime) -> npt.NDArray[np.float32]:
    """Stop before a vector that no proved artifact gives is written."""
    if not np.isfinite(vectors).all():
        raise MioError(
            f"{type(runtime).__name__} gave NaN or infinite embeddings; prove the bundle again: mio verify --images"
        )
    return vectors
