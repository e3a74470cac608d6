"""The views of a batch as one picture."""

import io
import math

import numpy as np
from PIL import Image

from mio_export.preprocess import Pixels

_COLUMNS = 6
_ENLARGED_SIDE = 112
_REDUCED_SIDE = 80
_GAP = 4


def views_sheet(images: Pixels, first: Pixels, second: Pixels) -> bytes:
    """Lay images out six a row, each above its two views, as a PNG with transparent gaps.

    Small images are enlarged by a whole factor without smoothing, large ones reduced.

    Args:
        images: uint8, shape (N, H, W, C), N at least 1, C 1 or 3.
        first: one view of each, of the same shape.
        second: another view of each.
    """
    height, width, channels = images.shape[1:]
    factor = _ENLARGED_SIDE // max(height, width)
    scale = factor if factor > 1 else min(1.0, _REDUCED_SIDE / max(height, width))
    tile = (round(width * scale), round(height * scale))
    columns, bands = min(_COLUMNS, len(images)), math.ceil(len(images) / _COLUMNS)
    step_x, step_y = tile[0] + _GAP, 3 * (tile[1] + _GAP) + 3 * _GAP
    size = (columns * step_x - _GAP, bands * step_y - 4 * _GAP)
    sheet = Image.new("LA" if channels == 1 else "RGBA", size)
    for index, trio in enumerate(zip(images, first, second, strict=True)):
        band, column = divmod(index, _COLUMNS)
        for row, pixels in enumerate(trio):
            picture = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if channels == 1 else pixels))
            picture = picture.resize(tile, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)
            sheet.paste(picture, (column * step_x, band * step_y + row * (tile[1] + _GAP)))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


__all__ = ["views_sheet"]
