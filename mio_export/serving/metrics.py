"""What a server counts, for Prometheus, and what it writes of each request: a JSON line on standard output."""

import asyncio
import functools
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from threading import Event, Thread

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from mio_export.serving.protocol import RequestError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_MOST_LINES = 10_000
"""Lines that wait for whoever reads the log; beyond them the oldest are dropped."""
_EVERY_S, _CLOSE_S = 0.1, 2.0


@dataclass(kw_only=True)
class Record:
    """What is known of a request that is being answered."""

    model: str
    num_images: int = 0
    num_failed: int = 0
    status: str = "ok"

    def count(self, errors: Sequence[str]) -> None:
        """Note the images of the request, and those that failed."""
        self.num_images += len(errors)
        self.num_failed += sum(map(bool, errors))


class Journal:
    """The metrics and the access log of one process; with several, ``exposition`` sums them up.

    Several processes count together where ``PROMETHEUS_MULTIPROC_DIR`` names a folder when this module is imported.
    """

    def __init__(self, *, access_log: bool) -> None:
        disable_created_metrics()
        self._registry = own = CollectorRegistry()
        self._requests = Counter("mio_requests", "Requests", ("model", "protocol", "outcome"), registry=own)
        self._seconds = Histogram("mio_request_seconds", "Time to answer", ("model",), registry=own, buckets=_SECONDS)
        images = Counter("mio_images", "Images by what became of them", ("result",), registry=own)
        self.images = {result: images.labels(result) for result in ("ok", "not_decoded", "not_finite")}
        self.batch = Histogram("mio_batch_images", "Images in a batch", registry=own, buckets=_BATCHES)
        self._counter = functools.cache(self._requests.labels)  # looking labels up takes longer than counting
        self._timer = functools.cache(self._seconds.labels)
        self.queue = Gauge("mio_queue_images", "Images not answered", registry=own, multiprocess_mode="livesum")
        self.waiting = Histogram("mio_queue_seconds", "Wait for a batch", registry=own, buckets=_SECONDS)
        self.decoding = Histogram("mio_decode_seconds", "Time to decode an image", registry=own, buckets=_SECONDS)
        self.inference = Histogram("mio_inference_seconds", "Time to embed a batch", registry=own, buckets=_SECONDS)
        self._log = _Log() if access_log else None

    @contextmanager
    def request(self, *, protocol: str, model: str, client: str) -> Iterator[Record]:
        """Follow a request to its end, and write down how it ended."""
        record, start = Record(model=model), time.perf_counter()
        try:
            yield record
        except RequestError as error:
            record.status = error.outcome
            raise
        except asyncio.CancelledError:
            record.status = "cancelled"
            raise
        except BaseException:
            record.status = "failed"
            raise
        finally:
            self._write(record, protocol, client, time.perf_counter() - start)

    def refused(self, *, protocol: str, client: str, reason: str) -> None:
        """Write down a request that was refused before it could be read."""
        self._write(Record(model="", status=reason), protocol, client, 0.0)

    def exposition(self) -> bytes:
        """Return the metrics of all processes in Prometheus's text format."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)

    def close(self) -> None:
        """Write what waits to be written."""
        if self._log is not None:
            self._log.close()

    def _write(self, record: Record, protocol: str, client: str, seconds: float) -> None:
        self._counter(record.model, protocol, record.status).inc()
        self._timer(record.model).observe(seconds)
        if self._log is not None:
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "client": client,
                "protocol": protocol,
                "model": record.model,
                "outcome": record.status,
                "images": record.num_images,
                "failed": record.num_failed,
                "seconds": round(seconds, 6),
            }
            self._log.add(json.dumps(line))


class _Log:
    """Lines on standard output, written together a few times a second: no request waits for whoever reads them."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_MOST_LINES)
        self._is_closed = Event()
        self._thread = Thread(target=self._write, name="access log", daemon=True)
        self._thread.start()
        self.add = self._lines.append

    def close(self) -> None:
        """Write what is left, if somebody reads it."""
        self._is_closed.set()
        self._thread.join(_CLOSE_S)

    def _write(self) -> None:
        is_last = False
        with suppress(OSError, ValueError):  # nobody reads it any more
            while not is_last:
                is_last = self._is_closed.wait(_EVERY_S)
                sys.stdout.write("".join([self._lines.popleft() + "\n" for _ in range(len(self._lines))]))
                sys.stdout.flush()


__all__ = ["CONTENT_TYPE", "Journal", "Record"]
