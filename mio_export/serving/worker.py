"""One process of a server: the engine, HTTP and gRPC in front of it; started by ``server``, which it tells its state.

On standard input it reads its settings, a line of JSON; when that ends, so does the server, and the worker.
"""

import asyncio
import json
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import uvicorn
import uvloop
from uvicorn.server import ServerState

from mio_export.bundle import load_bundle
from mio_export.errors import MioError
from mio_export.runtimes import Choice
from mio_export.serving.connection import Connection
from mio_export.serving.engine import Engine
from mio_export.serving.http import http_app
from mio_export.serving.metrics import Journal
from mio_export.serving.options import ServeOptions
from mio_export.serving.rpc import RpcService

_KEEP_ALIVE_S = 75
_HANDSHAKE_S = 10.0
_FAREWELL_S = 1.0
"""How long an ending server answers whoever comes, so that nobody's request is under way when it closes."""
_QUIET_S = 0.3
_LOOK_S = 0.02
_MOST_FILES = 65536


def main() -> None:
    """Serve until a signal, or the end of standard input; leave with status 1 if a request was not answered."""
    settings = json.loads(sys.stdin.buffer.readline())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(_MOST_FILES, hard)
    with suppress(OSError, ValueError):  # macOS allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    try:
        uvloop.run(_Worker(settings).run())
    except (MioError, RuntimeError) as error:  # gRPC's, where it cannot listen
        _tell(settings, failed=type(error).__name__, text=str(error))
        os._exit(1)  # a thread may wait for ever


def _tell(settings: dict[str, Any], **state: Any) -> None:
    with suppress(BrokenPipeError):
        os.write(settings["status"], json.dumps(state).encode() + b"\n")


def _connections() -> list[socket.socket]:
    """Return all open connections of this process; gRPC does not give its own away."""
    found = []
    for path in Path("/dev/fd").iterdir():
        with suppress(OSError):
            connection = socket.socket(fileno=os.dup(int(path.name)))
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                found.append(connection)
    return found


class _Worker:
    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._options = options = ServeOptions(**settings["options"])
        self._listener = socket.socket(fileno=settings["listener"])
        self._journal = Journal(access_log=options.access_log)
        self._engine = Engine(load_bundle(settings["bundle"]), Choice(**settings["choice"]), options, self._journal)
        self._service = RpcService(self._engine, options, self._journal)
        self._config = uvicorn.Config(
            http_app(self._engine, options, self._journal),
            log_config=None,
            log_level="error",  # what clients do wrong is in the access log
            lifespan="off",
            ws="none",
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            ssl_certfile=options.tls_cert,
            ssl_keyfile=options.tls_key,
        )
        self._config.load()
        self._state = ServerState()
        self._greeted: set[asyncio.Task[None]] = set()

    async def run(self) -> NoReturn:
        """Serve until the end of this process."""
        loop, end = asyncio.get_running_loop(), asyncio.Event()
        rpc = self._service.server(self._settings["address"])
        await rpc.start()
        self._listener.setblocking(False)
        loop.add_reader(self._listener, self._accept)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end.set)
        loop.add_reader(sys.stdin.fileno(), end.set)
        _tell(self._settings, ready=True)
        while not end.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(end.wait(), 0.5)
            if not self._engine.is_ready:
                raise MioError("the runtime's thread has ended")
        loop.remove_reader(sys.stdin.fileno())
        deadline = loop.time() + self._options.timeout_s
        await self._say_farewell()
        await self._wait_for_silence(deadline)
        num_open = self._num_open
        if not num_open:
            for connection in list(self._state.connections):
                connection.shutdown()
            # gRPC's own end would cancel calls that come now; so they are refused until the process ends at once
            await asyncio.to_thread(self._engine.close)
        await asyncio.to_thread(self._journal.close)
        _tell(self._settings, num_open=num_open)
        sockets = _connections()
        await asyncio.sleep(_LOOK_S)  # who came meanwhile is told
        for each in sockets:  # the end of a process frees its memory first, while clients go on sending
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        os._exit(1 if num_open else 0)  # what was not answered may hold a thread that never ends

    @property
    def _num_open(self) -> int:
        connections: Any = self._state.connections
        return int(sum(connection.is_busy for connection in connections)) + self._service.num_open

    def _accept(self) -> bool:
        """Take one connection; the other workers want some too."""
        loop = asyncio.get_running_loop()
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return False
        except OSError:  # no descriptors are left for now
            loop.remove_reader(self._listener)
            loop.call_later(_LOOK_S, lambda: loop.add_reader(self._listener, self._accept))
            return False
        connection.setblocking(False)
        task = loop.create_task(self._greet(connection))
        self._greeted.add(task)
        task.add_done_callback(self._greeted.discard)
        return True

    async def _greet(self, connection: socket.socket) -> None:
        tls, loop = self._config.ssl, asyncio.get_running_loop()
        with suppress(OSError):
            await loop.connect_accepted_socket(
                self._connection, connection, ssl=tls, ssl_handshake_timeout=_HANDSHAKE_S if tls else None
            )

    def _connection(self) -> Connection:
        timeout_s, most = self._options.timeout_s, self._engine.max_body_bytes
        return Connection(self._config, self._state, self._journal, timeout_s=timeout_s, most_bytes=most)

    async def _say_farewell(self) -> None:
        """Answer whoever comes for a moment, and close each connection that is answered; then listen no more."""
        loop = asyncio.get_running_loop()
        self._engine.end()
        start = loop.time()
        while (passed := loop.time() - start) < _FAREWELL_S:
            if passed > _QUIET_S and not self._state.connections and not self._greeted and not self._num_open:
                break
            await asyncio.sleep(_LOOK_S)
        loop.remove_reader(self._listener)
        while self._accept():
            pass
        self._listener.close()

    async def _wait_for_silence(self, deadline: float) -> None:
        """Refuse what comes over gRPC from now on, and wait until everything else is answered."""
        loop = asyncio.get_running_loop()
        self._service.is_refusing = True
        last = loop.time()
        while loop.time() < min(deadline, last + _QUIET_S):
            if self._num_open:
                last = loop.time()
            await asyncio.sleep(_LOOK_S)


__all__ = ["main"]
