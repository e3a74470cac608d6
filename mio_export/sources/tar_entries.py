"""The headers of a tar file, one after another, and whether it is whole."""

import struct
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, cast

DAMAGES = (
    tarfile.TarError,
    ValueError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    RecursionError,
    struct.error,
)
"""What reading a damaged header may raise; lack of memory is not among it, as no header can claim much."""
_MOST_HEADER_BYTES = 8 << 20
"""Of all headers of one entry: long names, pax records, the map of a sparse file."""


def tar_entries(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield all entries but folders, and make sure that the archive was whole; leave the file behind its end mark.

    Raises:
        Exception: one of ``DAMAGES``: an entry is damaged or cut off, its headers claim more than 8 MiB, or the end
            mark is missing.
        OSError: the file cannot be read.
    """
    headers = _Headers(file)
    with tarfile.open(fileobj=cast("BinaryIO", headers), mode="r:") as tar:
        for member in tar:
            vars(tar)["members"].clear()  # it would keep them all
            headers.num_bytes = 0
            if member.size < 0:
                raise tarfile.ReadError("an entry of negative length")  # some versions would read it for ever
            if not member.isdir():
                yield member
        end = tar.offset
    # tarfile takes a header that it cannot read, or a missing one, for the end of the archive
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no entry and no end mark at byte {end:,}")


class _Headers:
    """A file of which tarfile reads headers only, none of which may take or claim more than a few bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self.num_bytes = 0
        """Read since the last entry."""
        self.seek, self.tell = file.seek, file.tell
        self._read = file.read

    def read(self, size: int = -1) -> bytes:
        self.num_bytes += size
        if not 0 <= self.num_bytes <= _MOST_HEADER_BYTES or size < 0:
            raise tarfile.ReadError(f"the headers of an entry claim more than {_MOST_HEADER_BYTES:,} bytes")
        return self._read(size)


__all__ = ["DAMAGES", "tar_entries"]
