"""The decode contract: how the bytes of an image file become the uint8 pixels that an encoder takes.

Training, evaluation, embedding, export, parity and serving all decode through this module, so that the same file gives
the same pixels everywhere. The cast to float and the normalisation are part of the encoder's graph.
"""

import io
import json
import struct
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from mio_export.errors import UsageError
from mio_export.formats import readable_formats
from mio_export.schema import InvalidValueError, validated

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


class DecodeError(Exception):
    """These bytes are not an image that the contract allows; the message is the reason, in one line."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """The frozen decode contract of one encoder; it is hashed into the fingerprint of the embedding space.

    The fixed rules, version 1: EXIF orientation is applied; transparency is laid over ``background``; palettes are
    resolved; CMYK and other colour spaces are converted to RGB; 16-bit grey is divided by 257; grey becomes three equal
    channels, and colour becomes ITU-R 601 luma, as ``channels`` asks; of an animation the first frame counts; the
    shorter side is resized to ``resize_size`` with antialiasing and the centre is cropped, as torchvision's ``Resize``
    and ``CenterCrop`` do on Pillow images (of a strip beyond 16:1 only the middle is computed). A truncated file is
    an error.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

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
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

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
        """
        if not data:
            raise DecodeError("the file is empty")
        try:
            with Image.open(io.BytesIO(data), formats=readable_formats()) as image:
                if image.format == "PNG":
                    _check_sums(data)
                if scaled and image.format == "JPEG" and image.width * image.height <= self.max_pixels:
                    image.draft(None, (_SCALED_MARGIN * self.shorter_side, _SCALED_MARGIN * self.shorter_side))
                return self.pixels(image)
        except DecodeError:
            raise
        except UnidentifiedImageError:
            raise DecodeError("not an image that Pillow can read") from None
        except Image.DecompressionBombError:
            raise DecodeError(f"more than {self.max_pixels:,} pixels (decompression bomb)") from None
        except Exception as error:  # Pillow's readers raise whatever a broken file leads them to
            raise DecodeError(_one_line(error)) from error

    def pixels(self, image: Image.Image) -> Pixels:
        """Bring an opened Pillow image to the contract's pixels: uint8, shape (H, W, C)."""
        if image.width * image.height > self.max_pixels:
            raise DecodeError(
                f"{image.width}x{image.height} is more than {self.max_pixels:,} pixels (decompression bomb)"
            )
        image.seek(0)
        image = _oriented(image)
        image = _flattened(image, self.background).convert("L" if self.channels == 1 else "RGB")
        image = _resized_crop(image, self.shorter_side, self.image_size, self.interpolation)
        return np.array(image, dtype=np.uint8).reshape(self.shape)


def preprocess_from_dict(values: dict[str, Any]) -> Preprocess:
    """Build a contract from text that came from outside, strictly.

    Raises:
        UsageError: a key is unknown or missing, or a value is not allowed.
    """
    try:
        return validated(values, Preprocess)
    except InvalidValueError as error:
        raise UsageError(f"preprocess: {error}") from None


def _check_sums(data: bytes) -> None:
    """Compare a PNG's check sums: Pillow's decoder stops at the last row, and misses one flipped bit in a hundred.

    Raises:
        DecodeError: one does not fit.
    """
    with Image.open(io.BytesIO(data)) as image:
        try:
            image.verify()
        except SyntaxError:
            raise DecodeError("damaged: a check sum of the PNG does not fit") from None
        except (OSError, EOFError):
            return  # it ends early; whether all pixels are there, decoding shows


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _oriented(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; a file whose EXIF block cannot be read is taken as it lies, as viewers do."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except (ValueError, SyntaxError, TypeError, KeyError, IndexError, OSError, struct.error, UserWarning):
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def _flattened(image: Image.Image, background: int) -> Image.Image:
    """Bring any mode to 8-bit without transparency: L or an RGB-convertible mode."""
    if image.mode.startswith("I"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise DecodeError("32-bit float pixels have no declared range; save the image with 8 or 16 bits")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (background, background, background, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB") if image.mode == "P" else image


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise DecodeError(
            "32-bit integer pixels beyond 0..65535 have no declared range; save the image with 8 or 16 bits"
        )
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


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
