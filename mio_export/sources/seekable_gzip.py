"""What a gzip file holds, read by positions, with nothing unpacked to the disk.

One pass keeps copies of the decompressor's state along the way; a read goes on from the nearest one. Reads in the
order of the file cost one pass in all, others at most the distance between two states.

Source: the idea of zran.c in https://github.com/madler/zlib/tree/master/examples
"""

import zlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING

from mio_export.sources.blob import Blob, CheckedOnce, file_of

if TYPE_CHECKING:
    from zlib import _Decompress

_INPUT_BYTES = 1 << 16
_WINDOW_BYTES = 8 << 20
_FIRST_SPACING_BYTES = 1 << 20
_MOST_STATES = 512
"""Of about 45 kB each; when there are more, every other one is dropped."""
_OUTPUT_BYTES = 1 << 20
"""The most that comes out at once: 64 kB of input can stand for 64 MB."""
_GZIP = 31


@dataclass(frozen=True, slots=True)
class _State:
    offset: int
    """Of the next byte that comes out."""
    position: int
    """Of the next byte that goes in."""
    inflate: "_Decompress"
    is_inside: bool
    """Whether a member of the gzip file has begun, and not ended."""


class Gunzipped:
    """The content of a gzip file, of one member or several; many threads may read it, one at a time.

    Attributes:
        problem: why its content is not whole, once a read came to the damaged place; None until then.
        size: how many bytes can be read, once a read came to the end; 0 until then.
    """

    def __init__(self, blob: Blob) -> None:
        self.problem: str | None = None
        self.size = 0
        self._blob = blob
        self._lock = Lock()
        self._checked = CheckedOnce(blob)
        self._input = file_of(self._checked, buffer_bytes=max(blob.buffer_bytes, _INPUT_BYTES))
        self._states = [_State(0, 0, zlib.decompressobj(_GZIP), False)]
        self._spacing = _FIRST_SPACING_BYTES
        self._go_back(self._states[0])

    def __reduce__(self) -> tuple[object, ...]:
        """Travel to another process without the decompressor's states, which only this one can hold."""
        return _arrived, (self._blob,)

    def read_at(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on; fewer where the content ends or is damaged."""
        with self._lock:
            state = self._states[bisect_right(self._states, offset, key=lambda state: state.offset) - 1]
            if offset < self._start or state.offset > self._end:
                self._go_back(state)
            while self._end < offset + size:
                if not self._advance(offset):
                    self.size = self._end
                    break
            with memoryview(self._window) as window:
                return bytes(window[offset - self._start : offset - self._start + size])

    def check(self) -> None:
        """Make sure that what was read so far is all of one version of the file.

        Raises:
            OSError: it changed since it was listed.
        """
        with self._lock:
            self._checked.check()

    @property
    def _end(self) -> int:
        return self._start + len(self._window)

    def _go_back(self, state: _State) -> None:
        self._start, self._position, self._is_inside = state.offset, state.position, state.is_inside
        self._inflate = state.inflate.copy()
        self._window = bytearray()
        self._is_broken = False

    def _advance(self, needed: int) -> bool:
        """Decompress a little more; False at the end. Bytes well before ``needed`` are forgotten."""
        if self._is_broken:
            return False
        data = self._next_input()
        if not data and (rest := self._inflate.decompress(b"", _OUTPUT_BYTES)):
            self._window += rest
            return True
        if not data:
            self.problem = "its gzip stream is cut off" if self._is_inside else self.problem
            return False
        before = self._inflate.copy()
        try:
            content = self._inflate.decompress(data, _OUTPUT_BYTES)
        except zlib.error as error:
            self.problem = f"its gzip stream is damaged ({error})"
            self._window += _up_to_damage(before, data)
            self._is_broken = True
            return False
        self._window += content
        self._position += len(data) - len(self._inflate.unused_data) - len(self._inflate.unconsumed_tail)
        self._is_inside = not self._inflate.eof
        if self._inflate.eof:
            self._inflate = zlib.decompressobj(_GZIP)
        self._forget(needed)
        self._remember()
        return True

    def _next_input(self) -> bytes:
        """Return what is to be decompressed next; nothing at the end, where zeros may be that fill up a block."""
        while True:
            self._input.seek(self._position)
            data = self._input.read(_INPUT_BYTES)
            if self._is_inside or not data:
                return data
            if content := data.lstrip(b"\0"):  # padding is allowed between members, too
                self._position += len(data) - len(content)
                return content
            self._position += len(data)

    def _forget(self, needed: int) -> None:
        excess = min(len(self._window) - _WINDOW_BYTES, needed - self._start)
        if excess > _WINDOW_BYTES:
            del self._window[:excess]
            self._start += excess

    def _remember(self) -> None:
        if self._end < self._states[-1].offset + self._spacing:
            return
        self._states.append(_State(self._end, self._position, self._inflate.copy(), self._is_inside))
        if len(self._states) > _MOST_STATES:
            self._states = self._states[::2]
            self._spacing *= 2


@lru_cache(maxsize=4)
def _arrived(blob: Blob) -> Gunzipped:
    """Return one object for all that come of the same file, so that it is not read from its start for each."""
    return Gunzipped(blob)


def _up_to_damage(inflate: "_Decompress", data: bytes) -> bytes:
    """Return what comes out before the byte that is refused."""
    content = bytearray()
    for index in range(len(data)):
        try:
            content += inflate.decompress(data[index : index + 1])
        except zlib.error:
            break
    return bytes(content)


__all__ = ["Gunzipped"]
