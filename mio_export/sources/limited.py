"""Reading no more than a limit, whatever the length of a file is said to be."""

from typing import Protocol

from mio_export.sources.listing import check_size

_PIECE_BYTES = 1 << 16


class _File(Protocol):
    def read(self, size: int, /) -> bytes: ...


def read_limited(file: _File, expected: int, max_bytes: int) -> bytes:
    """Return what is left of a file.

    Args:
        file: may give less than asked for, and nothing at its end only.
        expected: how many bytes there should be; another number is no error.
        max_bytes: the most that are held in memory, apart from one piece of 64 KiB.

    Raises:
        OSError: there are more than ``max_bytes``, or they cannot be read.
    """
    pieces, size, wanted = [], 0, min(expected, max_bytes) + 1
    while piece := file.read(wanted):
        pieces.append(piece)
        size += len(piece)
        check_size(size, max_bytes)
        wanted = max(min(expected - size, max_bytes - size) + 1, _PIECE_BYTES)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


__all__ = ["read_limited"]
