"""What decodes files within limits: most of them here, and in a process apart those that may take long."""

from dataclasses import replace
from threading import Lock
from types import TracebackType
from typing import Self

from mio_export.decoding.bounded import passes_of
from mio_export.decoding.process import CrashError, DecodingProcess
from mio_export.errors import UsageError
from mio_export.limits import Limits
from mio_export.preprocess import DecodeError, Pixels, Preprocess

_MOST_PASSES = 1 << 28
_PASSES_PER_S = 4e6
"""What the slowest processor does; a file that may not be done in time at this speed is decoded apart."""


class Decoder:
    """Decodes image files to one contract's pixels, within limits; threads may use it at once; a context manager.

    A thread cannot be stopped, so it decodes only what the first bytes of the file show to be quick. Everything else is
    decoded in separate processes, one for each thread that needs one, started on demand and killed at the time limit.

    Args:
        preprocess: the contract.
        scaled: decode large JPEGs at a fraction of their size, as ``Preprocess.decode`` does.
        limits: of one file; None: the defaults.
        isolated: decode every file in a separate process, so that one that crashes a codec ends nothing else.

    Attributes:
        limits: of one file.

    Raises:
        UsageError: more pixels are to be allowed than the contract allows.
    """

    def __init__(
        self, preprocess: Preprocess, *, scaled: bool = False, limits: Limits | None = None, isolated: bool = False
    ) -> None:
        self.limits = limits or Limits()
        self._preprocess = within(preprocess, self.limits)
        self._scaled, self._isolated = scaled, isolated
        self._most_passes = min(_MOST_PASSES, self.limits.decode_s * _PASSES_PER_S)
        self._lock = Lock()
        self._idle: list[DecodingProcess] = []
        self._busy: set[DecodingProcess] = set()
        self._is_closed = False

    def decode(self, data: bytes) -> Pixels:
        """Decode an image file.

        Returns:
            uint8, shape (H, W, C) of the contract.

        Raises:
            DecodeError: the file is at fault: it is no image, breaks the contract or goes beyond a limit.
            MemoryError: the machine has not enough memory, which is not the file's fault.
            MioError: no process can be started.
        """
        most = self.limits.max_file_bytes
        if len(data) > most:
            raise DecodeError(f"has {len(data):,} bytes, more than the limit of {most:,} (--max-file-bytes)")
        if not self._isolated and self._is_quick(data):
            return self._preprocess.decode(data, scaled=self._scaled)
        try:
            return self._decode_apart(data)
        except CrashError:  # whatever came before may have left it in disorder: once more, in a new one
            self._close_idle()
        try:
            return self._decode_apart(data)
        except CrashError as error:
            raise DecodeError(str(error)) from None

    def can_scale(self, data: bytes) -> bool:
        """Whether ``scaled`` makes any difference to a file; of one that may take long it is not found out."""
        return self._is_quick(data) and self._preprocess.can_scale(data)

    def close(self) -> None:
        """End all processes; a thread that waits for one gets an error."""
        with self._lock:
            self._is_closed = True
            for process in self._busy:
                process.kill()
        self._close_idle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _is_quick(self, data: bytes) -> bool:
        passes = passes_of(data)
        return passes is not None and passes <= self._most_passes

    def _decode_apart(self, data: bytes) -> Pixels:
        process = self._taken()
        try:
            pixels = process.decode(data, scaled=self._scaled)
        except DecodeError:
            self._give_back(process)
            raise
        except BaseException:
            self._drop(process)
            raise
        self._give_back(process)
        return pixels

    def _taken(self) -> DecodingProcess:
        with self._lock:
            self._check_open()
            process = self._idle.pop() if self._idle else None
        if process is not None and not process.is_alive:  # killed meanwhile, by whoever; no file is to blame
            process.close()
            process = None
        if process is None:
            process = DecodingProcess(self._preprocess, self.limits)
        with self._lock:
            if not self._is_closed:
                self._busy.add(process)
                return process
        process.close()
        self._check_open()
        raise AssertionError

    def _give_back(self, process: DecodingProcess) -> None:
        with self._lock:
            self._busy.discard(process)
            if not self._is_closed and process.is_alive:
                self._idle.append(process)
                return
        process.close()

    def _drop(self, process: DecodingProcess) -> None:
        with self._lock:
            self._busy.discard(process)
        process.close()

    def _close_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for process in idle:
            process.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the decoder is closed")


def within(preprocess: Preprocess, limits: Limits) -> Preprocess:
    """Return a contract that allows no more pixels than the limits do.

    Raises:
        UsageError: they would allow more than the contract, which is part of the embedding space.
    """
    if limits.max_pixels is None:
        return preprocess
    if limits.max_pixels > preprocess.max_pixels:
        raise UsageError(
            f"max_pixels {limits.max_pixels:,} is more than the encoder's contract allows ({preprocess.max_pixels:,})"
        )
    return replace(preprocess, max_pixels=limits.max_pixels)


__all__ = ["Decoder", "within"]
