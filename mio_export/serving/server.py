"""One running server: started on a checked bundle, watched, and ended without losing a request."""

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from mio_export.bundle import Bundle, broken_files, load_bundle
from mio_export.embedding.choices import fastest
from mio_export.errors import GateError, Interrupted, MioError, UsageError
from mio_export.progress import Progress
from mio_export.runtimes import Choice, choose
from mio_export.runtimes.registry import check_evidence
from mio_export.serving.settings import BUSY, DECODE, JPEG, ServeOptions
from mio_export.serving.workspace import Triton, command, model_name, write_workspace

_START_S = 300.0
_GRACE_S = 5.0
_IDLE_LOOKS = 3
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_SHARED_MEMORY = Path("/dev/shm")


class Server:
    """A Triton server with the models ``NAME`` and ``NAME_jpeg`` of a bundle; a context manager.

        with Server("encoder.mio", ServeOptions()) as server:
            print(server.description())
            server.wait()

    Entering returns when the server is ready. Leaving ends it: requests that are open are answered first.

    Raises:
        UsageError: an option is not allowed, a port is taken, or nothing proved can be served.
        GateError: a file of the bundle is not what it was; nothing was started.
        MissingBackendError: Triton is not installed.
        MioError: the server did not start.
    """

    def __init__(
        self, bundle: Bundle | str | Path, options: ServeOptions | None = None, *, progress: Progress | None = None
    ) -> None:
        self._triton = Triton.installed()
        self.options = options or ServeOptions()
        self.bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
        broken = broken_files(self.bundle)
        if broken:
            raise GateError("\n     ".join([f"{self.bundle.path} is not served; it was changed", *broken]))
        self.name = model_name(self.bundle)
        self.options.batch_for(self.bundle)
        self._check_ports()
        self.choice = _settled(self.bundle, self.options, progress or Progress())
        check_evidence(self.bundle, self.choice)
        self._workspace: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._shm_prefix = f"mio-{os.getpid()}-{time.time_ns()}-"

    @property
    def http_url(self) -> str:
        """What ``RemoteEncoder`` takes."""
        return f"http://{_bracketed(self.options.host)}:{self.options.http_port}/{self.name}"

    @property
    def grpc_url(self) -> str:
        """What ``RemoteEncoder`` takes."""
        return f"grpc://{_bracketed(self.options.host)}:{self.options.grpc_port}/{self.name}"

    def description(self) -> str:
        """Return where the server listens, what it runs, how well that was proved, and how to call it."""
        shape = ", ".join(str(extent) for extent in self.bundle.manifest.preprocess.shape)
        choice = self.choice
        return "\n".join(
            [
                f"serving {self.bundle.path}, space {self.bundle.manifest.space[:12]}…",
                f"  artifact  {choice.file} ({choice.runtime} {choice.precision} on {choice.device})",
                f"  parity    {_parity(self.bundle, self.choice)}",
                f"  models    {self.name}: uint8 (N, {shape}); {self.name}{JPEG}: encoded images, bytes (N, 1);"
                f" N up to {self.options.batch_for(self.bundle)}",
                f"  HTTP      {self.http_url}",
                f"  gRPC      {self.grpc_url}",
                f"  metrics   http://{_bracketed(self.options.host)}:{self.options.metrics_port}/metrics",
                "call it:",
                '  python -c "from mio_export.serving import RemoteEncoder;'
                f" print(RemoteEncoder('{self.http_url}').embed_files([open('photo.jpg', 'rb').read()]))\"",
            ]
        )

    def __enter__(self) -> Self:
        self._workspace = tempfile.TemporaryDirectory(prefix="mio-serve-")
        folder = Path(self._workspace.name)
        try:
            write_workspace(
                folder, self._triton, name=self.name, bundle=self.bundle, choice=self.choice, options=self.options
            )
            self._process = subprocess.Popen(
                command(folder, self._triton, self.options, shm_prefix=self._shm_prefix),
                env=self._triton.environment(),
                stdout=2,  # what workers print is no result
                cwd=folder,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the server in order
                preexec_fn=_die_with_parent,
            )
            self._wait_until_ready()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def wait(self) -> None:
        """Watch the server until a signal ends it; then open requests are answered, and this returns.

        Triton keeps saying that it is ready when one of its workers is dead, so a dead worker ends the server at once:
        whoever starts services starts it again, and until then nobody is told that it is ready.

        Raises:
            MioError: the server or one of its workers died.
        """
        assert self._process is not None
        descriptors = {os.pidfd_open(pid): pid for pid in (self._process.pid, *_children(self._process.pid))}
        poll = select.poll()
        for descriptor in descriptors:
            poll.register(descriptor, select.POLLIN)
        try:
            dead = descriptors[poll.poll()[0][0]]
        except Interrupted:
            self._drain()
            return
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        what = "the server" if dead == self._process.pid else "a worker of the server"
        self._kill()
        raise MioError(f"{what} (process {dead}) died, so that everything was stopped; start it again")

    def _check_ports(self) -> None:
        family = socket.AF_INET6 if ":" in self.options.host else socket.AF_INET
        for name in ("http_port", "grpc_port", "metrics_port"):
            port = getattr(self.options, name)
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((self.options.host, port))
                except (OSError, OverflowError) as error:
                    reason = getattr(error, "strerror", None) or error
                    option = "--" + name.replace("_", "-")
                    raise UsageError(
                        f"cannot listen at {self.options.host} port {port}: {reason}; choose another {option} or --host"
                    ) from None

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        url = f"http://{_reached(self.options.host)}:{self.options.http_port}/v2/health/ready"
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise MioError(f"the server did not start (status {self._process.returncode}); it said why above")
            with suppress(OSError), _OPENER.open(url, timeout=1) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.05)
        raise MioError(f"the server was not ready after {_START_S:.0f} s")

    def _drain(self) -> None:
        """Let the server answer what it has, and end.

        A Triton that ends finishes each model's own requests, but refuses the second half of a chain: so it is told to
        end at a moment when nothing is decoded.
        """
        assert self._process is not None
        deadline = time.monotonic() + self.options.timeout_s
        idle = 0
        while idle < _IDLE_LOOKS and time.monotonic() < deadline and self._process.poll() is None:
            idle = idle + 1 if self._decodes_nothing() else 0
            time.sleep(0.02)
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(self.options.timeout_s + _GRACE_S)

    def _decodes_nothing(self) -> bool:
        url = f"http://{_reached(self.options.host)}:{self.options.metrics_port}/metrics"
        try:
            with _OPENER.open(url, timeout=1) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:
            return True  # it is not there yet, or no more
        names = (BUSY, "nv_inference_pending_request_count")
        starts = tuple(f'{name}{{model="{self.name}{DECODE}"' for name in names)
        return not any(line.startswith(starts) and float(line.rpartition(" ")[2]) for line in lines)

    def _end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._drain()
        self._kill()
        if self._workspace is not None:
            self._workspace.cleanup()

    def _kill(self) -> None:
        """End the server and its workers at once, and remove the shared memory that they would leave."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for region in _SHARED_MEMORY.glob(f"*{self._shm_prefix}*"):
            region.unlink(missing_ok=True)


def _settled(bundle: Bundle, options: ServeOptions, progress: Progress) -> Choice:
    """Choose the artifact as ``mio embed`` does; only one that was proved is served."""
    if options.runtime == "auto":
        choice = fastest(bundle, precision=options.precision, device=options.device, progress=progress)
    else:
        choice = choose(bundle, options.runtime, precision=options.precision, device=options.device)
    if choice.runtime == "torch":
        raise UsageError(f"{bundle.path} has no proved artifact to serve; export one: mio export -f onnx")
    return choice


def _parity(bundle: Bundle, choice: Choice) -> str:
    proof = next(
        a.parity
        for a in bundle.manifest.artifacts
        if (a.file, a.precision, a.parity.verdict) == (choice.file, choice.precision, "proved")
    )
    report = json.loads((bundle.path / proof.report).read_text())
    found, budget = report["comparisons"], report["budget"]
    allowed = budget["max_rms_error"]
    return (
        f"proved on {'+'.join(proof.devices)}: cosine {min(c['min_cosine'] for c in found):.7f} at worst,"
        f" rms error {max(c['rms_relative_error'] for c in found):.1e}"
        + (f" of {allowed:.1e} allowed" if allowed is not None else "")
    )


def _children(pid: int) -> Iterator[int]:
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if folder.name.isdigit() and int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                yield int(folder.name)


def _die_with_parent() -> None:
    """Let the kernel end the server when this process is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _reached(host: str) -> str:
    """Return where this machine reaches what listens at ``host``."""
    return _bracketed({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


__all__ = ["Server"]
