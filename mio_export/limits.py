"""What one file may cost: bytes, pixels and seconds."""

import math
from dataclasses import dataclass

from mio_export.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that one file may cost; a file beyond it is a failed row with the reason.

    Raises:
        UsageError: a value is not allowed.
    """

    max_file_bytes: int = 256 * 1024**2
    """Bytes of one file, unpacked, ≥ 1."""
    max_pixels: int | None = None
    """Pixels of one image, ≥ 1, at most the ``max_pixels`` of the encoder's contract; None: those."""
    decode_s: float = 60.0
    """Seconds to decode one file, > 0."""

    def __post_init__(self) -> None:
        if self.max_file_bytes < 1:
            raise UsageError(f"max_file_bytes must be 1 or more, got {self.max_file_bytes}")
        if self.max_pixels is not None and self.max_pixels < 1:
            raise UsageError(f"max_pixels must be 1 or more, got {self.max_pixels}")
        if not (self.decode_s > 0 and math.isfinite(self.decode_s)):
            raise UsageError(f"decode_s must be a number of seconds above 0, got {self.decode_s}")


__all__ = ["Limits"]
