"""The decode contract: how the bytes of an image file become the uint8 pixels that an encoder takes.

Training, evaluation, embedding, export, parity and serving all decode through this module, so that the same file gives
the same pixels everywhere. The cast to float and the normalisation are part of the encoder's graph.
"""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from mio_export.errors import UsageError, one_line
from mio_export.image_formats.claims import claimed_sizes
from mio_export.image_formats.orientation import orientation_of, split_exif
from mio_export.image_formats.png import MAGIC, PngFile, read_png
from mio_export.image_formats.supported import readable_formats
from mio_export.memory import lacks_memory
from mio_export.schema import InvalidValueError, strict, validated

Pixels = npt.NDArray[np.uint8]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

_STRIP = 16  # an image more than this many times as long as wide is a strip
_SCALED_MARGIN = 2  # a JPEG decoded at a fraction of its size stays this many times as large as what is made of it
_RESAMPLING: dict[Interpolation, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DecodeError(Exception):
    """These bytes are not an image that the contract allows; the message is the reason, in one line."""


@strict
@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """The frozen decode contract of one encoder; it is hashed into the fingerprint of the embedding space.

    The fixed rules, version 1: EXIF orientation is applied; transparency is laid over ``background``; palettes are
    resolved; CMYK and other colour spaces are converted to RGB; 16-bit grey is divided by 257, and 16-bit colour, or
    grey with alpha, keeps its higher 8 bits; grey becomes three equal
    channels, and colour becomes ITU-R 601 luma, as ``channels`` asks; of an animation the first frame counts; the
    shorter side is resized to ``resize_size`` with antialiasing and the centre is cropped, as torchvision's ``Resize``
    and ``CenterCrop`` do on Pillow images (of a strip beyond 16:1 only the middle is computed). A truncated file is
    an error.
    """

    image_size: int
    """Side of the square that the encoder takes, in pixels, ≥ 1."""
    resize_size: int | None = None
    """Length of the shorter side before the crop, in pixels, ≥ ``image_size``; None means ``image_size``."""
    interpolation: Interpolation = "bilinear"
    """Resize filter; all but ``nearest`` are antialiased."""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for RGB."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, pixels counted in [0, 1]."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, pixels counted in [0, 1], > 0."""
    background: int = 255
    """Grey level behind transparent pixels, 0 to 255."""
    max_pixels: int = 178_956_970
    """Images with more pixels are refused as decompression bombs (Pillow's own limit)."""
    rules: Literal[1] = 1
    """Version of the fixed rules above."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "resize_size", self.resize_size or self.image_size)
        checks = (
            (self.image_size >= 1, f"image_size must be 1 or more, got {self.image_size}"),
            (
                self.shorter_side >= self.image_size,
                f"resize_size {self.resize_size} is below image_size {self.image_size}",
            ),
            (
                self.interpolation in _RESAMPLING,
                f"interpolation {self.interpolation!r} is not one of {', '.join(_RESAMPLING)}",
            ),
            (self.channels in (1, 3), f"channels must be 1 or 3, got {self.channels}"),
            (len(self.mean) == self.channels, f"mean needs {self.channels} values, got {self.mean}"),
            (len(self.std) == self.channels, f"std needs {self.channels} values, got {self.std}"),
            (all(value > 0 for value in self.std), f"std must be above 0, got {self.std}"),
            (0 <= self.background <= 255, f"background must be 0 to 255, got {self.background}"),
            (self.max_pixels >= 1, f"max_pixels must be 1 or more, got {self.max_pixels}"),
        )
        for holds, message in checks:
            if not holds:
                raise UsageError(message)

    @property
    def shorter_side(self) -> int:
        """Length of the shorter side before the crop, in pixels."""
        return self.resize_size or self.image_size

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the pixels that ``decode`` returns."""
        return (self.image_size, self.image_size, self.channels)

    def to_dict(self) -> dict[str, Any]:
        """Return the contract as JSON-ready values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    def decode(self, data: bytes, *, scaled: bool = False) -> Pixels:
        """Decode an image file.

        Args:
            data: the whole file.
            scaled: let libjpeg decode a large JPEG at a half, a quarter or an eighth of its size, while that stays at
                least twice what is resized to; several times faster, almost the same pixels. Others are not touched.

        Returns:
            uint8, shape (H, W, C) = ``shape``.

        Raises:
            DecodeError: the bytes are no image, are cut off, or break the contract.
            MemoryError: the machine has not enough memory, which is not the file's fault.
        """
        with self.opened(data, scaled=scaled) as image:
            return self.pixels(image)

    @contextmanager
    def opened(self, data: bytes, *, scaled: bool = False) -> Iterator[Image.Image]:
        """Open an image file as ``decode`` does; within this context, ``pixels`` returns what it is decoded to.

        Its size is checked, and is known before most formats take memory for pixels.

        Raises:
            DecodeError: as ``decode``, for whatever goes wrong in the context too.
            MemoryError: the machine has not enough memory.
        """
        if not data:
            raise DecodeError("the file is empty")
        try:
            for size in claimed_sizes(data):
                self._check_size(*size)
            png = _read_png(data) if data.startswith(MAGIC) else None
            with _identified(png.data if png else data) as image:
                self._check_size(image.width, image.height)
                if scaled:
                    self._draft(image)
                yield _with_png_details(image, png) if png else image
        except (DecodeError, MemoryError):
            raise
        except UnidentifiedImageError:
            raise DecodeError("not an image that Pillow can read") from None
        except Image.DecompressionBombError:
            raise DecodeError(f"more than {self.max_pixels:,} pixels (decompression bomb)") from None
        except Exception as error:  # Pillow's readers raise whatever a broken file leads them to
            if lacks_memory(error):
                raise MemoryError(_one_line(error)) from error
            raise DecodeError(_one_line(error)) from error

    def can_scale(self, data: bytes) -> bool:
        """Whether ``scaled`` makes any difference to an image file: it is a JPEG, and large enough."""
        try:
            with self.opened(data) as image:
                return self._draft(image)
        except DecodeError:
            return False

    def pixels(self, image: Image.Image) -> Pixels:
        """Bring an opened Pillow image to the contract's pixels: uint8, shape (H, W, C)."""
        self._check_size(image.width, image.height)
        image.seek(0)
        image = _oriented(image)
        image, mode = _flattened(image, self.background), "L" if self.channels == 1 else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        image = _resized_crop(image, self.shorter_side, self.image_size, self.interpolation)
        return np.array(image, dtype=np.uint8).reshape(self.shape)

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise DecodeError(f"{width}x{height} is more than {self.max_pixels:,} pixels (decompression bomb)")

    def _draft(self, image: Image.Image) -> bool:
        """Let libjpeg decode a large JPEG at a fraction of its size; return whether it will."""
        if image.format != "JPEG":
            return False
        size, side = image.size, _SCALED_MARGIN * self.shorter_side
        image.draft(None, (side, side))
        return image.size != size


def preprocess_from_dict(values: dict[str, Any]) -> Preprocess:
    """Build a contract from text that came from outside, strictly.

    Raises:
        UsageError: a key is unknown or missing, or a value is not allowed.
    """
    try:
        return validated(values, Preprocess)
    except InvalidValueError as error:
        raise UsageError(f"preprocess: {error}") from None


def _identified(data: bytes) -> Image.Image:
    """Open an image file; of a JPEG whose EXIF block Pillow fails on, the block is put beside what it opens."""
    try:
        return Image.open(io.BytesIO(data), formats=readable_formats())
    except UnidentifiedImageError:
        bare, block = split_exif(data)
        if not block:
            raise
    image = Image.open(io.BytesIO(bare), formats=readable_formats())
    image.info["exif"] = block
    return image


def _read_png(data: bytes) -> PngFile:
    try:
        return read_png(data)
    except ValueError as error:
        raise DecodeError(f"damaged: {error}") from None


def _with_png_details(image: Image.Image, png: PngFile) -> Image.Image:
    """Give an opened PNG what Pillow leaves out: texts that say which way up it lies, and exact transparency.

    The transparent level of a grey with 2 or 4 bits counts in those bits, but Pillow has made 8 of its pixels; that of
    an RGB with 16 bits has 16 too, but Pillow keeps the higher 8 of its pixels.
    """
    if image.format != "PNG":
        return image
    level = image.info.get("transparency")
    if png.colour == 0 and png.depth in (2, 4) and isinstance(level, int):
        most = 2**png.depth - 1
        image.info["transparency"] = (level & most) * (255 // most)
    if png.colour == 2 and png.depth == 16 and isinstance(level, tuple):
        high = np.asarray(image)
        low = _low_bytes(png.data)
        del image.info["transparency"]
        is_seen = (high != [value >> 8 for value in level]) | (low != [value & 255 for value in level])
        image.putalpha(Image.fromarray(is_seen.any(axis=2).astype(np.uint8) * 255))
    for name, value in png.info.items():
        image.info.setdefault(name, value)
    return image


def _low_bytes(data: bytes) -> Pixels:
    """Return the lower 8 bits of an RGB PNG with 16, shape (H, W, 3)."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
        return np.asarray(image)


def _one_line(error: Exception) -> str:
    message = one_line(error, None)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _oriented(image: Image.Image) -> Image.Image:
    """Turn the pixels upright; the EXIF block is read for that alone, and never written again."""
    try:
        image.load()
    except (SyntaxError, OSError, ValueError):
        if image.format != "PNG":
            raise
        image.load()  # passes if all rows are there, and what is behind them is damaged
    method = _TRANSPOSITIONS.get(_tiff_orientation(image) if image.format == "TIFF" else orientation_of(image.info))
    return image if method is None else image.transpose(method)


def _tiff_orientation(image: Image.Image) -> Any:
    """Return what is left to do of a TIFF's orientation, which Pillow applies while it loads."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # noqa: BLE001 - Pillow raises whatever a broken block leads it to
        return 1


def _flattened(image: Image.Image, background: int) -> Image.Image:
    """Bring any mode to 8-bit without transparency: L or an RGB-convertible mode."""
    if image.mode.startswith("I"):
        return _from_16_bit(image, background)
    if image.mode == "F":
        raise DecodeError("32-bit float pixels have no declared range; save the image with 8 or 16 bits")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (background, background, background, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB") if image.mode == "P" else image


def _from_16_bit(image: Image.Image, background: int) -> Image.Image:
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise DecodeError(
            "32-bit integer pixels beyond 0..65535 have no declared range; save the image with 8 or 16 bits"
        )
    levels = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        levels[values == transparent] = background
    return Image.fromarray(levels)


def _resized_crop(image: Image.Image, shorter_side: int, crop: int, interpolation: Interpolation) -> Image.Image:
    """Resize the shorter side, then crop the centre, as torchvision's ``Resize`` and ``CenterCrop``.

    Of a strip, only a window around the crop is computed, at the same scale and phase and wider than any filter: a
    60,000x1 image resized whole would be 60,000 times as large as its crop.
    """
    width, height = (int(shorter_side * extent / min(image.size)) for extent in image.size)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    window = (0, 0, width, height)
    if max(image.size) > _STRIP * min(image.size):
        margin = 4 * shorter_side
        window = (
            max(0, left - margin),
            max(0, top - margin),
            min(width, left + crop + margin),
            min(height, top + crop + margin),
        )
    size = (window[2] - window[0], window[3] - window[1])
    if image.size != size:
        x, y = image.width / width, image.height / height
        box = (window[0] * x, window[1] * y, min(image.width, window[2] * x), min(image.height, window[3] * y))
        image = image.resize(size, _RESAMPLING[interpolation], box=box)
    left, top = left - window[0], top - window[1]
    return image.crop((left, top, left + crop, top + crop))


__all__ = ["DecodeError", "Interpolation", "Pixels", "Preprocess", "preprocess_from_dict"]
