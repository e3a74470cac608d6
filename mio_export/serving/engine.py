"""What computes in a server: decoding in processes of their own, batches of what waits, one thread for the runtime."""

import asyncio
import math
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Condition, Thread

import numpy as np

from mio_export.bundle import Bundle
from mio_export.decoding import Decoder
from mio_export.embedding.computing import ImageMemoryError, embed_carefully
from mio_export.errors import MioError
from mio_export.preprocess import DecodeError, Pixels
from mio_export.runtimes import Choice
from mio_export.runtimes.base import Embeddings
from mio_export.runtimes.devices import num_threads
from mio_export.runtimes.opening import open_choice
from mio_export.serving.metrics import Journal
from mio_export.serving.options import ServeOptions
from mio_export.serving.protocol import RequestError, Served

_RATE_HALF_LIFE_S = 5.0
_DOOR = 0.85
"""Share of the longest wait at which new requests are refused, so that those on their way in are not."""
_ONE_PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c636000000002000148afa471"
    "0000000049454e44ae426082"
)
"""A PNG that every decoding process is started with."""


@dataclass(eq=False)
class _Work:
    """Images of one request that wait for the runtime, or are in it."""

    images: Pixels
    done: "asyncio.Future[Embeddings]"
    since: float = field(default_factory=time.perf_counter)


class Engine:
    """One runtime and its decoders; all methods but the constructor and ``close`` belong to the event loop.

    What waits while a batch is computed becomes the next batch, of whole requests. A request is refused at once when
    the queue is full or would take longer than its limit.

    Args:
        bundle: what is served.
        choice: the artifact, settled.
        options: the limits.
        journal: what is counted.

    Raises:
        MioError: the artifact or a decoding process cannot be opened.
    """

    def __init__(self, bundle: Bundle, choice: Choice, options: ServeOptions, journal: Journal) -> None:
        max_batch = options.batch_for(bundle)
        self.served = Served.of(bundle, choice, decode=options.decode, max_batch=max_batch)
        self.max_body_bytes = options.body_bytes_for(bundle)
        self.num_open = 0
        self.is_ending = False
        self._options, self._journal = options, journal
        self._runtime = open_choice(bundle, choice)
        self._decoder = Decoder(
            bundle.manifest.preprocess,
            scaled=options.decode == "scaled",
            limits=options.limits_for(bundle),
            isolated=True,
        )
        self._rate = _Rate()
        self._num_held = 0
        for size in dict.fromkeys((1, 1 if choice.device == "cpu" else max_batch)):
            self._runtime.embed(np.zeros((size, *self.served.image_shape), np.uint8))
        self._pool = ThreadPoolExecutor(num_threads(), "decode")
        for done in [self._pool.submit(self._decoder.decode, _ONE_PIXEL) for _ in range(num_threads())]:
            done.result()
        self._queue: deque[_Work] = deque()
        self._changed = Condition()
        self._is_closed = False
        self._thread = Thread(target=self._compute, name="runtime", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether new requests are welcome."""
        return not self.is_ending and self._thread.is_alive()

    def end(self) -> None:
        """Be ready no more; requests that come all the same are answered."""
        self.is_ending = True

    def check_room(self, num_images: int = 1, *, is_at_door: bool = False) -> None:
        """Refuse a request that would have to wait too long.

        Args:
            num_images: of the request.
            is_at_door: whether it is not read yet. Then it is refused a little earlier, so that whoever is let in finds
                room after reading too, however long that takes.

        Raises:
            RequestError: now there is no room for so many images.
        """
        if not self._thread.is_alive():
            raise RequestError("not_ready", "the server is not ready", retry_after_s=1)
        wait_s = self._rate.seconds_for(self._num_held)
        is_full = self._num_held > 0 and self._num_held + num_images > self._options.max_queue
        if is_full or wait_s > self._options.max_wait_s * (_DOOR if is_at_door else 1):
            raise RequestError(
                "queue_full",
                f"{self._num_held} images wait, for about {wait_s:.1f} s; try again later",
                retry_after_s=max(1.0, wait_s / 2),
            )

    async def infer(self, images: Sequence[bytes] | Pixels) -> tuple[Embeddings, list[str]]:
        """Embed the images of one request.

        Args:
            images: encoded files, or uint8 of shape (N, H, W, C); at most ``served.max_batch``.

        Returns:
            float32, shape (N, D), NaN where an image failed; and the reason of each, empty where it did not.

        Raises:
            RequestError: there is no room, it waited too long, or the runtime failed.
        """
        number = len(images)
        self.check_room(number)
        deadline = time.perf_counter() + self._options.max_wait_s
        self._hold(number)
        self.num_open += 1
        try:
            if isinstance(images, np.ndarray):
                errors, vectors = [""] * number, await self._embedded(images, deadline)
            else:
                decoded = await self._decoded(images, deadline)
                errors = [item if isinstance(item, str) else "" for item in decoded]
                vectors = np.full((number, self.served.embedding_dim), np.nan, np.float32)
                if pixels := [item for item in decoded if not isinstance(item, str)]:
                    vectors[[not error for error in errors]] = await self._embedded(np.stack(pixels), deadline)
            self._judge(vectors, errors)
            self._rate.finish(number)
            return vectors, errors
        finally:
            self.num_open -= 1
            self._hold(-number)

    def close(self) -> None:
        """End the thread and the processes; who still waits is told that the server ends."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._decoder.close()
        self._pool.shutdown(cancel_futures=True)
        self._thread.join()
        self._runtime.close()

    def _hold(self, number: int) -> None:
        if number > 0 and not self._num_held:
            self._rate.start()
        self._num_held += number
        self._journal.queue.set(self._num_held)

    def _judge(self, vectors: Embeddings, errors: list[str]) -> None:
        """Count what became of each image; one whose embedding is not finite has failed."""
        counts = self._journal.images
        failed = [index for index, error in enumerate(errors) if error]
        counts["not_decoded"].inc(len(failed))
        if len(failed) or not math.isfinite(vectors.sum()):  # a sum is quick, and finite if all are, mostly
            for index in np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist():
                if not errors[index]:
                    errors[index], vectors[index] = "its embedding is not finite", np.nan
                    counts["not_finite"].inc()
        counts["ok"].inc(errors.count(""))

    async def _decoded(self, files: Sequence[bytes], deadline: float) -> list[Pixels | str]:
        """Decode files to pixels, or to the reason why there are none."""
        loop = asyncio.get_running_loop()
        futures = [loop.run_in_executor(self._pool, self._decode, file) for file in files]
        try:
            _, left = await asyncio.wait(futures, timeout=max(0.0, deadline - time.perf_counter()))
            if left:
                raise self._timed_out()
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def _decode(self, file: bytes) -> Pixels | str:
        start = time.perf_counter()
        try:
            try:
                return self._decoder.decode(file)
            except MemoryError:  # or somebody has killed the process, which looks the same: once more
                return self._decoder.decode(file)
        except DecodeError as error:
            return str(error)
        except MemoryError:
            return "the server has not enough memory to decode it"
        except (MioError, RuntimeError) as error:  # no process can be started, or the decoder is closed
            return f"it cannot be decoded now: {error}"
        finally:
            self._journal.decoding.observe(time.perf_counter() - start)

    async def _embedded(self, images: Pixels, deadline: float) -> Embeddings:
        """Wait for the runtime; who has waited too long, or is gone, leaves the queue."""
        work = _Work(images, asyncio.get_running_loop().create_future())
        with self._changed:
            self._queue.append(work)
            self._changed.notify()
        try:
            await asyncio.wait((work.done,), timeout=max(0.0, deadline - time.perf_counter()))
            if not work.done.done() and self._withdrawn(work):
                raise self._timed_out()
            return await work.done
        except asyncio.CancelledError:
            self._withdrawn(work)
            raise

    def _withdrawn(self, work: _Work) -> bool:
        """Take work out of the queue; False if it is being computed."""
        with self._changed:
            if work in self._queue:
                self._queue.remove(work)
                return True
        return False

    def _timed_out(self) -> RequestError:
        wait_s = self._options.max_wait_s
        return RequestError("timed_out", f"the request waited for more than {wait_s:g} s", retry_after_s=wait_s)

    def _compute(self) -> None:
        """Embed batch after batch, in the runtime's thread."""
        while batch := self._taken():
            start = time.perf_counter()
            for work in batch:
                self._journal.waiting.observe(start - work.since)
            images = np.concatenate([work.images for work in batch]) if len(batch) > 1 else batch[0].images
            result: Embeddings | RequestError
            try:
                result = embed_carefully(self._runtime, [""] * len(images), images)
            except ImageMemoryError:
                result = RequestError("failed", "the server has not enough memory", retry_after_s=1)
            except Exception:  # noqa: BLE001 - runtimes raise whatever they have
                traceback.print_exc(file=sys.stderr)
                result = RequestError("failed", "the server failed to embed the images")
            self._journal.inference.observe(time.perf_counter() - start)
            self._journal.batch.observe(len(images))
            loop = batch[0].done.get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(_hand_out, batch, result)

    def _taken(self) -> list[_Work]:
        """Wait for requests, and take as many as one batch holds; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._is_closed)
            batch: list[_Work] = []
            room = self.served.max_batch
            while self._queue and len(self._queue[0].images) <= room:
                batch.append(self._queue.popleft())
                room -= len(batch[-1].images)
            return batch


class _Rate:
    """Images per second while there is work, the last seconds counting most."""

    def __init__(self) -> None:
        self._images, self._seconds, self._last = 0.0, 0.0, 0.0

    def start(self) -> None:
        """Work begins."""
        self._last = time.perf_counter()

    def finish(self, number: int) -> None:
        """So many images were answered."""
        passed, self._last = time.perf_counter() - self._last, time.perf_counter()
        fading = 0.5 ** (passed / _RATE_HALF_LIFE_S)
        self._images, self._seconds = self._images * fading + number, self._seconds * fading + passed

    def seconds_for(self, number: int) -> float:
        """Return how long so many images take; 0 before anything is known."""
        return number * self._seconds / self._images if self._images else 0.0


def _hand_out(batch: Sequence[_Work], result: Embeddings | RequestError) -> None:
    start = 0
    for work in batch:
        stop = start + len(work.images)
        if not work.done.done():
            if isinstance(result, RequestError):
                work.done.set_exception(result)
            else:
                work.done.set_result(result[start:stop])
        start = stop


__all__ = ["Engine"]
