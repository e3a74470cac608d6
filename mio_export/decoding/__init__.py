"""Decoding within limits of bytes, pixels, seconds and memory, whatever a file holds."""

from mio_export.decoding.decoder import Decoder, within

__all__ = ["Decoder", "within"]
