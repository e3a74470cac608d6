"""One running server: a checked bundle, sockets, and worker processes that are replaced when they die."""

import json
import os
import selectors
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from ctypes import addressof, create_string_buffer
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mio_export import errors
from mio_export.bundle import Bundle, broken_files, load_bundle, named_files
from mio_export.console.progress import Progress
from mio_export.decoding.process import search_path
from mio_export.errors import GateError, Interrupted, MioError, UsageError
from mio_export.evidence import ParityReport
from mio_export.runtimes import Choice, choose
from mio_export.runtimes.selection import check_evidence
from mio_export.runtimes.timing import fastest
from mio_export.serving.options import ServeOptions
from mio_export.serving.protocol import PIXELS, model_name

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from mio_export.serving.worker import main; main()"
_SPARE_S = 5.0
_MOST_DEATHS = 3
_BACKLOG = 2048
_ATTACH_FILTER = 26
_NO_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
"""A packet filter: drop what asks for a connection (bit 1 of byte 13 of TCP's header), pass everything else."""


@dataclass(eq=False, kw_only=True)
class _Process:
    """A worker, and what it has told."""

    process: "subprocess.Popen[bytes]"
    status: int
    heard: bytes = b""
    state: dict[str, Any]


class Server:
    """A server of a bundle, over HTTP and gRPC; a context manager.

        with Server("encoder.mio", ServeOptions()) as server:
            print(server.description())
            server.wait()

    Entering returns when the server is ready. Leaving ends it: requests that are open are answered first.

    Args:
        bundle: a bundle or its path.
        options: None: the defaults.
        progress: is told how fast each artifact is, where the fastest is looked for.

    Raises:
        UsageError: an option is not allowed, a port is taken, or nothing proved can be served.
        GateError: a file of the bundle or its proof is not what it was; nothing listens.
        MioError: the server did not start.
    """

    def __init__(
        self, bundle: Bundle | str | Path, options: ServeOptions | None = None, *, progress: Progress | None = None
    ) -> None:
        self.options, self._progress = options or ServeOptions(), progress or Progress()
        self.bundle, self.choice = checked(bundle, self.options, self._progress)
        self.name = model_name(self.bundle.path.resolve().name.removesuffix(".mio"))
        self._family, self._address = _resolved(self.options.host)
        _check_pair(self.options.tls_cert, self.options.tls_key)
        self._stack = ExitStack()
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Process] = []
        self._num_deaths, self._num_open, self._is_ending = 0, 0, False

    def description(self) -> str:
        """Return where the server listens, what it runs, how well that was proved, and how to call it."""
        choice, options = self.choice, self.options
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(options.host, options.host)
        host = f"[{host}]" if ":" in host and host[0] != "[" else host
        end = "s" if options.tls_cert else ""
        http, grpc = f"http{end}://{host}:{options.http_port}", f"grpc{end}://{host}:{options.grpc_port}/{self.name}"
        shape = ", ".join(map(str, self.bundle.manifest.preprocess.shape))
        key = '-H "Authorization: Bearer $MIO_API_KEY" ' if options.api_key else ""
        return "\n".join(
            [
                f"serving {self.bundle.path}, space {self.bundle.manifest.space[:12]}…",
                f"  artifact  {choice.file} ({choice.runtime} {choice.precision} on {choice.device})",
                f"  parity    {_parity(self.bundle, choice)}",
                f"  models    {self.name}: image files, bytes (N, 1); {self.name}{PIXELS}: uint8 (N, {shape});"
                f" N up to {options.batch_for(self.bundle)}",
                f"  HTTP      {http}/{self.name}",
                f"  gRPC      {grpc}",
                f"  metrics   {http}/metrics, documentation {http}/docs",
                "call it:",
                '  python -c "from mio_export import RemoteEncoder;'
                f" print(RemoteEncoder('{http}/{self.name}').embed_files(['photo.jpg']))\"",
                f"  base64 < photo.jpg | tr -d '\\n' | jq -Rs '{{model: \"{self.name}\", input: .}}'"
                f" | curl {key}-d @- {http}/v1/embeddings",
            ]
        )

    def __enter__(self) -> Self:
        try:
            self._listener = self._stack.enter_context(self._bound("http_port"))
            self._stack.enter_context(self._bound("grpc_port"))
            self._folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mio-serve-"))
            for _ in range(self.options.workers):
                self._start()
            while not all(worker.state.get("ready") for worker in self._workers):
                self._look(None)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._end()
        finally:
            self._close()

    def wait(self) -> int:
        """Watch the server until a signal ends it; a worker that dies is replaced.

        Returns:
            The number of requests that were open and could not be answered in time.

        Raises:
            MioError: workers die before they are ready.
        """
        with suppress(Interrupted, KeyboardInterrupt):
            while True:
                self._look(None)
        return self._end()

    def _start(self) -> None:
        read, write = os.pipe()
        settings = {
            "bundle": str(self.bundle.path.resolve()),
            "options": asdict(self.options),
            "choice": asdict(self.choice),
            "address": self._address,
            "listener": self._listener.fileno(),
            "status": write,
        }
        # several count together; one alone counts faster by itself
        together = {"PROMETHEUS_MULTIPROC_DIR": self._folder} if self.options.workers > 1 else {}
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _START, json.dumps(search_path())],
                stdin=subprocess.PIPE,
                pass_fds=(self._listener.fileno(), write),
                env={"GRPC_VERBOSITY": "NONE", **os.environ, **together},
                start_new_session=True,  # Ctrl-C is for this process, which then ends that one in order
            )
        finally:
            os.close(write)
        worker = _Process(process=process, status=read, state={})
        self._workers.append(worker)
        self._selector.register(read, selectors.EVENT_READ, worker)
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead already, and its other pipe says so
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            process.stdin.flush()

    def _look(self, timeout_s: float | None) -> None:
        """Wait until a worker says something, or ends."""
        for key, _ in self._selector.select(timeout_s):
            worker: _Process = key.data
            if part := os.read(worker.status, 4096):
                worker.heard += part
                *lines, worker.heard = worker.heard.split(b"\n")
                for line in lines:
                    worker.state |= json.loads(line)
                    self._num_deaths = 0 if worker.state.get("ready") else self._num_deaths
            else:
                self._bury(worker)

    def _bury(self, worker: _Process) -> None:
        """Take note of a worker's end; unless all of them end, another takes its place."""
        from prometheus_client.multiprocess import mark_process_dead

        self._workers.remove(worker)
        self._selector.unregister(worker.status)
        os.close(worker.status)
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        status, state = worker.process.wait(), worker.state
        mark_process_dead(worker.process.pid, self._folder)
        if self._is_ending:
            self._num_open += state.get("num_open", 1 if state.get("ready") else 0)
            return
        how = state.get("text") or (f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}")
        self._num_deaths += not state.get("ready")
        kind = getattr(errors, state.get("failed", ""), MioError)
        is_final = kind is not MioError and not state.get("ready")  # it would be said again
        if is_final or self._num_deaths >= _MOST_DEATHS:
            raise kind(f"the server does not start: {how}")
        self._progress.line(f"a worker (process {worker.process.pid}) ended: {how}; another starts")
        self._start()

    def _end(self) -> int:
        """Let the workers answer what is open, and end; return how many requests were not answered."""
        if not self._is_ending:
            self._is_ending = True
            _turn_newcomers_away(self._listener)
            self._listener.close()  # the workers have it too, and close it last
            for worker in self._workers:
                worker.process.terminate()
            deadline = time.monotonic() + self.options.timeout_s + _SPARE_S
            while self._workers and time.monotonic() < deadline:
                self._look(deadline - time.monotonic())
            self._num_open += len(self._workers)
        return self._num_open

    def _close(self) -> None:
        self._is_ending = True
        for worker in [*self._workers]:
            worker.process.kill()
            self._bury(worker)
        self._selector.close()
        self._stack.close()

    def _bound(self, option: str) -> socket.socket:
        """Listen for HTTP; or keep a port for gRPC, where every worker listens."""
        place = (self._address, getattr(self.options, option))
        try:
            listener = socket.create_server(
                place, family=self._family, backlog=_BACKLOG, dualstack_ipv6=self._address == "::"
            )
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if option == "http_port":
                return listener
            listener.close()
            keeper = socket.socket(self._family)
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            keeper.bind(place)
            return keeper
        except OSError as error:
            raise UsageError(
                f"cannot listen at {place[0]} port {place[1]}: {os.strerror(error.errno or 0)}; choose another"
                f" --{option.replace('_', '-')} or --host"
            ) from None


def checked(bundle: Bundle | str | Path, options: ServeOptions, progress: Progress) -> tuple[Bundle, Choice]:
    """Open a bundle and choose its artifact as ``mio embed`` does; only one that was proved is served.

    Raises:
        UsageError: there is none, or an option does not fit the bundle.
        GateError: a file of the bundle or its evidence is not what it was.
    """
    bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    if broken := broken_files(bundle):
        raise GateError("\n     ".join([f"{bundle.path} is not served; it was changed", *broken]))
    options.batch_for(bundle)
    if options.runtime == "auto":
        checked = {name for name, _ in named_files(bundle.manifest)}  # as none of them is broken
        with fastest(
            bundle, precision=options.precision, device=options.device, progress=progress, checked=checked
        ) as selected:
            choice = selected.choice  # the workers open their own
    else:
        choice = choose(bundle, options.runtime, precision=options.precision, device=options.device)
    if choice.runtime == "torch":
        raise UsageError(f"{bundle.path} has no proved artifact to serve; export one: mio export -f onnx")
    check_evidence(bundle, choice)
    return bundle, choice


def _resolved(host: str) -> tuple[int, str]:
    """Return the family and the numeric address of a host of this machine."""
    try:
        family, *_, place = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host!r} is no address of this machine: {error}") from None
    return family, str(place[0])


def _check_pair(cert: str | None, key: str | None) -> None:
    """Refuse a certificate and a key that do not belong together, or cannot be read."""
    try:
        if cert and key:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key, password="")
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(f"{cert} and {key} are no certificate and its key: {error}") from None


def _turn_newcomers_away(listener: socket.socket) -> None:
    """Let the kernel drop new connections from now on, where it can, so that none is accepted and then left alone."""
    if sys.platform == "linux":
        code = create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in _NO_SYN))
        with suppress(OSError):
            program = struct.pack("HL", len(_NO_SYN), addressof(code))
            listener.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)


def _parity(bundle: Bundle, choice: Choice) -> str:
    proof = bundle.artifacts(runtime=choice.runtime, precision=choice.precision, file=choice.file)[0].parity
    report = ParityReport.load(bundle.path / proof.report)
    found, allowed = report.comparisons, report.budget.max_rms_error
    return (
        f"proved on {'+'.join(proof.devices)}: cosine {min(c.min_cosine for c in found):.7f} at worst,"
        f" rms error {max(c.rms_relative_error for c in found):.1e}"
        + (f" of {allowed:.1e} allowed" if allowed is not None else "")
    )


__all__ = ["Server", "checked"]
