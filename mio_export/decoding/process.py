"""A process that decodes one file at a time, and can be killed while it does, as no thread can."""

import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from mio_export.decoding.messages import FAILED, NO_MEMORY, NO_MEMORY_STATUS, PIXELS, READY, REPLY, REQUEST
from mio_export.errors import MioError
from mio_export.limits import Limits
from mio_export.memory import lacks_memory
from mio_export.preprocess import DecodeError, Pixels, Preprocess

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from mio_export.decoding.child import main; main()"
_READ_BYTES = 1 << 20
_MOST_TEXT_BYTES = 1 << 16
_END_S = 5
_MOST_DECODE_S = 1e6
"""Eleven days; neither ``poll`` nor a timer can count as many seconds as a float."""


class CrashError(Exception):
    """The process ended while it decoded; the message says how."""


class DecodingProcess:
    """One process; threads take turns.

    It is not a copy of this process, and does not run the user's main module again: it imports the decode contract and
    nothing else. It ends when it is killed, when this process ends in whatever way, or with the first file that it
    does not survive.

    Args:
        preprocess: the contract that it decodes by.
        limits: its ``decode_s`` is kept here; the other limits are the caller's.

    Raises:
        MioError: it cannot be started.
        MemoryError: there is not enough memory to start it.
    """

    def __init__(self, preprocess: Preprocess, limits: Limits) -> None:
        self._shape, self._decode_s = preprocess.shape, min(limits.decode_s, _MOST_DECODE_S)
        self._process = _started()
        self._is_killed = False
        settings = {"preprocess": preprocess.to_dict(), "decode_s": self._decode_s}
        try:
            self._send(json.dumps(settings).encode() + b"\n", None)
            self._received(None, {READY: 0})
        except CrashError as error:
            reason = self._last_words()
            self.close()
            raise MioError(f"the decoding process cannot be started: {reason or error}") from None
        except BaseException:
            self.close()
            raise

    def decode(self, data: bytes, *, scaled: bool) -> Pixels:
        """Decode a file, as ``Preprocess.decode`` does.

        Raises:
            DecodeError: the file is at fault: it breaks the contract, or takes more time or memory than it may.
            MemoryError: the machine has not enough memory.
            CrashError: the process ended.
        """
        deadline = time.monotonic() + self._decode_s
        self._send(REQUEST.pack(scaled, len(data)), deadline)
        self._send(data, deadline)
        longest = {PIXELS: math.prod(self._shape), FAILED: _MOST_TEXT_BYTES, NO_MEMORY: _MOST_TEXT_BYTES}
        kind, content = self._received(deadline, longest)
        if kind == FAILED:
            raise DecodeError(content.decode())
        if kind == NO_MEMORY:
            raise MemoryError(content.decode())
        return np.frombuffer(content, np.uint8).reshape(self._shape)

    @property
    def is_alive(self) -> bool:
        """Whether it can take another file."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End it, whatever it is doing; any thread may call this, and who waits for a file gets a ``CrashError``."""
        self._is_killed = True
        self._process.kill()

    def close(self) -> None:
        """End it and close its pipes; only for the thread that uses it."""
        self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def _send(self, data: bytes, deadline: float | None) -> None:
        assert self._process.stdin is not None
        descriptor, left = self._process.stdin.fileno(), memoryview(data)
        os.set_blocking(descriptor, False)  # a process that is stopped reads nothing
        try:
            while left:
                self._wait(descriptor, select.POLLOUT, deadline)
                with suppress(BlockingIOError):
                    left = left[os.write(descriptor, left) :]
        except BrokenPipeError:
            raise self._ended() from None

    def _received(self, deadline: float | None, longest: Mapping[bytes, int]) -> tuple[bytes, bytearray]:
        """Wait for a reply of one of the kinds, of at most so many bytes each."""
        kind, length = REPLY.unpack(self._read(REPLY.size, deadline))
        if length > longest.get(kind, -1):
            raise CrashError("the decoding process gave a reply that makes no sense")
        return kind, self._read(length, deadline)

    def _read(self, length: int, deadline: float | None) -> bytearray:
        assert self._process.stdout is not None
        descriptor, data = self._process.stdout.fileno(), bytearray()
        while len(data) < length:
            self._wait(descriptor, select.POLLIN, deadline)
            part = os.read(descriptor, min(length - len(data), _READ_BYTES))
            if not part:
                raise self._ended()
            data += part
        return data

    def _wait(self, descriptor: int, event: int, deadline: float | None) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(None if deadline is None else 1000 * max(0, deadline - time.monotonic())):
            self.kill()
            raise DecodeError(f"decoding takes more than {self._decode_s:g} seconds (--max-decode-seconds)")

    def _ended(self) -> Exception:
        """Return what the end of the process means."""
        try:
            status = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.kill()
            status = self._process.wait()
        if status == NO_MEMORY_STATUS:
            return MemoryError("the decoding process has not enough memory for the file")
        if self._is_killed or status >= 0:
            return CrashError(f"the decoder ended with status {status}")
        if status == -signal.SIGKILL:
            return MemoryError("the decoder was killed, as systems do when their memory ends")
        return CrashError(f"the decoder crashed ({signal.Signals(-status).name})")

    def _last_words(self) -> str:
        assert self._process.stderr is not None
        self.kill()
        lines = self._process.stderr.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")


def _started() -> "subprocess.Popen[bytes]":
    if not sys.executable:
        raise MioError("the decoding process cannot be started: this Python does not know its interpreter")
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-c", _START, json.dumps(search_path())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for this process, which then ends that one
        )
    except OSError as error:
        if lacks_memory(error):
            raise MemoryError("there is not enough memory to start a decoding process") from error
        raise MioError(f"the decoding process cannot be started: {error.strerror or error}") from None


def search_path() -> list[str]:
    """Return where this process finds modules, as absolute paths."""
    paths = []
    for entry in sys.path:
        with suppress(OSError):  # relative to a working directory that was removed: nothing is found there
            paths.append(str(Path(entry).absolute()))
    return paths


__all__ = ["CrashError", "DecodingProcess", "search_path"]
