"""Small pictures that lie in the page itself, each once; ``templates/thumbnails.html`` shows them."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mio_export.preprocess import Pixels


@dataclass(frozen=True)
class Thumbnail:
    """A picture as a page holds it."""

    url: str
    """A ``data:`` URL."""
    crisp: bool
    """Whether it is drawn without smoothing, being smaller than was asked for."""


def thumbnail(pixels: Pixels, side: int) -> Thumbnail:
    """Return pixels, reduced to ``side`` or less, as JPEG; smaller ones as PNG where that takes fewer bytes.

    Args:
        pixels: uint8, shape (H, W, C), C 1 or 3.
        side: the most that the picture's width and height may be, in pixels.
    """
    picture = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
    crisp = max(picture.size) < side
    kinds = ("JPEG", "PNG") if crisp else ("JPEG",)  # a PNG takes seventy times as long to write
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return Thumbnail(min((_encoded(picture, kind) for kind in kinds), key=len), crisp)


def _encoded(picture: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, optimize=True, **({"quality": 75} if kind == "JPEG" else {}))
    return data_url(buffer.getvalue(), kind)


def data_url(data: bytes, kind: str) -> str:
    """Return an image file as a ``data:`` URL; ``kind`` is ``PNG`` or ``JPEG``."""
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"


__all__ = ["Thumbnail", "data_url", "thumbnail"]
