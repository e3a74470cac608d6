"""Requests over HTTP: bodies within limits of length and time, and clients that go away."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.requests import ClientDisconnect, Request

from mio_export.runtimes.base import Embeddings
from mio_export.serving.protocol import RequestError

_MOST_HELD = 8
"""Bodies of the longest size that are held at once; beyond them requests are refused."""


class Bodies:
    """Reads bodies, and knows how much of them is held.

    Args:
        most_bytes: longest body.
        timeout_s: longest time to send one, in seconds.
    """

    def __init__(self, most_bytes: int, timeout_s: float) -> None:
        self._most_bytes, self._timeout_s, self._held_bytes = most_bytes, timeout_s, 0

    @contextmanager
    def reader(self, request: Request) -> Iterator[Callable[[], Awaitable[bytearray]]]:
        """Give what reads a request's body, within the limits of its length and time; count what is held meanwhile."""
        body, most = bytearray(), self._most_bytes

        async def read() -> bytearray:
            length = request.headers.get("content-length", "0")
            if request.headers.get("content-encoding", "identity") != "identity":
                raise RequestError("unsupported", "send the body without Content-Encoding")
            if length.isdecimal() and int(length) > most:
                raise RequestError("too_large", f"a request has at most {most:,} bytes, got {int(length):,}")
            try:
                async with asyncio.timeout(self._timeout_s):
                    async for part in request.stream():
                        self._held_bytes += len(part)
                        body.extend(part)
                        if len(body) > most:
                            raise RequestError("too_large", f"a request has at most {most:,} bytes")
                        if self._held_bytes > _MOST_HELD * most:
                            raise RequestError("queue_full", "too many bytes wait; try again later", retry_after_s=1)
            except TimeoutError:
                raise RequestError("too_slow", f"the body took more than {self._timeout_s:g} s") from None
            return body

        try:
            yield read
        finally:
            self._held_bytes -= len(body)


def check_size(text: bytearray, most: int) -> None:
    """Refuse JSON of more values than the largest request has, before they take memory."""
    if text.count(b",") + text.count(b"[") > most:
        raise ValueError("it has more values than any request")


def json_of(body: bytearray, most: int) -> dict[str, Any]:
    """Return the JSON object that a body is, of at most so many values.

    Raises:
        RequestError: it is none.
    """
    try:
        check_size(body, most)
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError("invalid", f"the body is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise RequestError("invalid", "the body must be a JSON object")
    return document


async def unless_gone(request: Request, work: Awaitable[tuple[Embeddings, list[str]]]) -> tuple[Embeddings, list[str]]:
    """Wait for work, and drop it when its client has gone.

    Raises:
        ClientDisconnect: it has.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


__all__ = ["Bodies", "check_size", "json_of", "unless_gone"]
