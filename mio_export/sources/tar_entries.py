"""The headers of a tar file, one after another, and whether it is whole."""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

DAMAGES = (tarfile.TarError, ValueError, OverflowError)
"""What reading a damaged header may raise."""


def tar_entries(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield all entries but folders, and make sure that the archive was whole; leave the file behind its end mark.

    Raises:
        TarError, ValueError, OverflowError: an entry is damaged or cut off, or the end mark is missing (``DAMAGES``).
        OSError: the file cannot be read.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            vars(tar)["members"].clear()  # it would keep them all
            if member.size < 0:
                raise tarfile.ReadError("an entry of negative length")  # some versions would read it for ever
            if not member.isdir():
                yield member
        end = tar.offset
    # tarfile takes a header that it cannot read, or a missing one, for the end of the archive
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no entry and no end mark at byte {end:,}")


__all__ = ["DAMAGES", "tar_entries"]
