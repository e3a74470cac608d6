"""Batches on their way to a runtime; where that is a GPU, the next is gathered while the last is computed."""

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from types import TracebackType
from typing import Self

import numpy as np

from mio_export.embedding.computing import embed_carefully
from mio_export.extras import is_installed
from mio_export.preprocess import Pixels
from mio_export.runtimes import Runtime
from mio_export.runtimes.base import Embeddings

_NUM_BUFFERS = 2


class InferenceQueue:
    """Takes batches to a runtime and gives their vectors back in the same order; a context manager.

    A CPU computes a batch when it comes, as it has no core to spare. A GPU is waited for by a thread of its own: the
    next batch is copied into another page-locked buffer meanwhile, which the GPU reads without the processor's help.

    Args:
        runtime: what computes.
        batch_size: most images in a batch.
        ahead: whether to do it in the GPU's way; None: if the runtime is on one.
    """

    def __init__(self, runtime: Runtime, batch_size: int, *, ahead: bool | None = None) -> None:
        self._runtime = runtime
        self._sent: deque[tuple[list[str], Future[Embeddings]]] = deque()
        self._thread = None
        if runtime.device != "cpu" if ahead is None else ahead:
            self._thread = ThreadPoolExecutor(1)
            self._buffers = cycle([_page_locked((batch_size, *runtime.image_shape)) for _ in range(_NUM_BUFFERS)])
        self.waited_s = 0.0
        """Seconds the caller was blocked on the runtime; whoever reads it resets it to 0."""

    def submit(self, batch: Mapping[str, Pixels]) -> list[tuple[list[str], Embeddings]]:
        """Send images of shape (H, W, C) by their names; return the names and vectors of batches that are done.

        Raises:
            ImageMemoryError: there is not enough memory for one image alone, whose name it has.
        """
        if self._thread is None:
            start = time.perf_counter()
            embeddings = embed_carefully(self._runtime, list(batch), np.stack(list(batch.values())))
            self.waited_s += time.perf_counter() - start
            return [(list(batch), embeddings)]
        done = [self._next()] if len(self._sent) == _NUM_BUFFERS else []
        buffer = next(self._buffers)[: len(batch)]
        np.stack(list(batch.values()), out=buffer)
        self._sent.append((list(batch), self._thread.submit(embed_carefully, self._runtime, list(batch), buffer)))
        return done

    def drain(self) -> list[tuple[list[str], Embeddings]]:
        """Return the batches that were still being computed."""
        return [self._next() for _ in range(len(self._sent))]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _next(self) -> tuple[list[str], Embeddings]:
        names, future = self._sent.popleft()
        start = time.perf_counter()
        embeddings = future.result()
        self.waited_s += time.perf_counter() - start
        return names, embeddings


def _page_locked(shape: tuple[int, ...]) -> Pixels:
    """Return memory that a GPU can read by itself, if PyTorch is there and can reserve it."""
    if not is_installed("torch"):
        return np.empty(shape, np.uint8)
    import torch

    return torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available()).numpy()


__all__ = ["InferenceQueue"]
