"""One HTTP connection: Uvicorn's, within limits that hold whatever the other side sends or does not send."""

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from mio_export.serving.metrics import Journal
from mio_export.serving.protocol import RequestError

MOST_CONNECTIONS = 1024
_HEAD_BYTES = 64 << 10
_HEAD_S = 10.0
_LINGER_S = 2.0
"""How long a refused client may go on sending, unheard; closing at once could take the answer from it."""
_SPARE_PARTS, _PART_BYTES = 1000, 256
"""A body may come in so many parts, and one more for so many bytes."""


class Connection(HttpToolsProtocol):
    """A connection that is refused, with the reason, when its client is too slow, too long-winded or one too many.

    Args:
        config: Uvicorn's.
        state: of all connections.
        journal: is told of what was refused.
        timeout_s: longest time to send a head (at most 10), and to take an answer.
        most_bytes: longest body; of what carries it, twice as much is read.
    """

    def __init__(
        self, config: Config, state: ServerState, journal: Journal, *, timeout_s: float, most_bytes: int
    ) -> None:
        super().__init__(config, state, {})
        self._journal, self._timeout_s, self._most_bytes = journal, timeout_s, most_bytes
        self._timer: asyncio.TimerHandle | None = None
        self._room, self._num_parts, self._num_bytes, self._num_answers = _HEAD_BYTES, 0, 0, 0
        self._in_head = self._in_body = self._is_refused = False

    @property
    def is_busy(self) -> bool:
        """Whether a request has begun and is not answered."""
        is_asked = self.cycle is not None and not self.cycle.response_complete
        return (self._in_head or is_asked) and not self._is_refused

    def connection_made(self, transport: Any) -> None:  # noqa: D102 - as its base says; so are the others
        super().connection_made(transport)
        self._expect(_HEAD_S)
        if len(self.connections) > MOST_CONNECTIONS:
            self._refuse(RequestError("not_ready", "too many connections", retry_after_s=1))

    def data_received(self, data: bytes) -> None:  # noqa: D102
        if self._is_refused:
            return
        if self._room < 0:
            self._refuse(RequestError("invalid", "the request is too long"))
            return
        self._room -= len(data)
        super().data_received(data)
        if self._timer is None and not self.is_busy and self.timeout_keep_alive_task is None:
            self._expect(_HEAD_S)

    def eof_received(self) -> bool:  # type: ignore[override]  # noqa: D102
        if self._is_refused:
            return False
        if self._in_head or self._in_body:
            self._refuse(RequestError("invalid", "the request is cut off"))
        elif self.is_busy:
            self.cycle.keep_alive = False  # who has said everything may still listen
            return self.scheme == "http"
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102
        self._expect(None)
        super().connection_lost(exc)

    def on_message_begin(self) -> None:  # noqa: D102
        super().on_message_begin()
        self._room, self._num_parts, self._num_bytes, self._in_head = _HEAD_BYTES, 0, 0, True
        self._expect(_HEAD_S)

    def on_headers_complete(self) -> None:  # noqa: D102
        self._in_head, self._in_body = False, True
        self._room = _HEAD_BYTES + 2 * self._most_bytes
        self._expect(None)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:  # noqa: D102
        self._num_parts += 1
        self._num_bytes += len(body)
        if self._num_parts > _SPARE_PARTS + self._num_bytes // _PART_BYTES:
            raise ValueError("the body comes in too many parts")
        super().on_body(body)

    def on_message_complete(self) -> None:  # noqa: D102
        self._in_body = False
        self._expect(None)
        super().on_message_complete()

    def on_response_complete(self) -> None:  # noqa: D102
        super().on_response_complete()
        if self._in_body:
            self._expect(self._timeout_s)
        self._num_answers += 1
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self._timeout_s, self._give_up_on, self._num_answers)

    def send_400_response(self, msg: str) -> None:  # noqa: D102
        self._refuse(RequestError("invalid", msg))

    def _expect(self, seconds: float | None) -> None:
        """Wait so long, and no longer, for what must come next."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(min(seconds, self._timeout_s), self._give_up)

    def _give_up(self) -> None:
        if self._in_head:
            self._refuse(RequestError("too_slow", "the head of the request took too long"))
        else:
            self.transport.close()

    def _give_up_on(self, number: int) -> None:
        """End the connection if the answer of this number, and so the last one, is not taken yet."""
        if number == self._num_answers and self.transport.get_write_buffer_size():
            self.transport.abort()

    def _refuse(self, error: RequestError) -> None:
        """Say why, unless another answer is due or given, and close the connection."""
        if self._is_refused:
            return
        self._is_refused = True
        self._expect(None)
        self._journal.refused(protocol="http", client=self.client[0] if self.client else "", reason=error.outcome)
        is_begun = self.cycle is not None and self.cycle.response_started
        is_asked = not is_begun or (self.cycle.response_complete and not self._in_body)
        if is_asked and not self.pipeline:
            later = "" if error.retry_after_s is None else f"Retry-After: {error.retry_after_s:.0f}\r\n"
            body = json.dumps({"error": str(error)})
            head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\n{later}Connection: close\r\n\r\n"
            self.transport.write((head + body).encode())
        if self.cycle is not None:
            self.cycle.disconnected = True  # the application hears that nobody listens
            self.cycle.message_event.set()
        self.flow.resume_reading()
        if self.transport.can_write_eof() and not self.pipeline:
            self.transport.write_eof()
            self.loop.call_later(_LINGER_S, self.transport.close)
        else:
            self.transport.close()


__all__ = ["MOST_CONNECTIONS", "Connection"]
