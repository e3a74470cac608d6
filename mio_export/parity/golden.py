"""Golden images: one file of each kind that a decoder can get wrong, made from a real photograph."""

import functools
import hashlib
import io
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mio_export.errors import GateError, one_line
from mio_export.preprocess import Pixels, Preprocess

GOLDEN = "parity/golden.safetensors"
_MAX_DIFFERENCE = 1
"""Grey levels by which another version of a decoder may round."""


def golden_files() -> dict[str, bytes]:
    """Return the files by name: lossless, so that their pixels do not depend on a codec's version."""
    return dict(_golden_files())


@functools.cache
def _golden_files() -> Mapping[str, bytes]:
    photo = Image.fromarray(_sample_photo("china.jpg")[60:380, 120:540])
    wide = Image.fromarray(_sample_photo("flower.jpg")[200:216])
    makers: dict[str, Callable[[], bytes]] = {
        "colour": lambda: _saved(photo, "PNG"),
        "grey": lambda: _saved(photo.convert("L"), "PNG"),
        "transparent": lambda: _saved(_transparent(photo), "PNG"),
        "CMYK": lambda: _saved(photo.convert("CMYK"), "TIFF"),
        "EXIF-rotated": lambda: _saved(photo, "PNG", exif=_orientation(6)),
        "EXIF-mirrored": lambda: _saved(photo, "PNG", exif=_orientation(2)),
        "16-bit": lambda: _saved(Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257), "PNG"),
        "palette": lambda: _saved(photo.quantize(64, dither=Image.Dither.NONE), "PNG"),
        "wide": lambda: _saved(wide, "PNG"),
        "tall": lambda: _saved(wide.transpose(Image.Transpose.ROTATE_90), "PNG"),
    }
    return {name: make() for name, make in makers.items()}


def golden_pixels(preprocess: Preprocess) -> dict[str, Pixels]:
    """Decode the golden images under a contract; uint8 (H, W, C) by name."""
    return {name: preprocess.decode(data) for name, data in golden_files().items()}


def save_golden(path: Path, pixels: Mapping[str, Pixels], embeddings: np.typing.NDArray[np.floating[Any]]) -> None:
    """Write the pixels, and their embeddings by the encoder in float64, shape (number of images, D)."""
    from safetensors.numpy import save

    tensors = {"pixels": np.stack(list(pixels.values())), "embeddings": np.ascontiguousarray(embeddings)}
    path.write_bytes(save(tensors, metadata={"names": "\n".join(pixels)}))


def load_golden(path: Path) -> tuple[dict[str, Pixels], np.typing.NDArray[np.float64]]:
    """Read what ``save_golden`` wrote.

    Raises:
        GateError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = file.metadata()["names"].split("\n")
            pixels, embeddings = file.get_tensor("pixels"), file.get_tensor("embeddings")
            if pixels.dtype != np.uint8 or embeddings.dtype != np.float64 or not np.isfinite(embeddings).all():
                raise ValueError("pixels must be uint8, embeddings finite float64")
            return dict(zip(names, pixels, strict=True)), embeddings
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise GateError(f"{path} is damaged: {one_line(error, None)}") from None


def decoding_problems(expected: Mapping[str, Pixels], found: Mapping[str, Pixels]) -> list[str]:
    """Compare golden pixels with what this machine decodes; a line for each image that differs."""
    problems = []
    for name, pixels in expected.items():
        if name not in found or found[name].shape != pixels.shape:
            problems.append(f"preprocessing: golden image {name} is not decoded to {pixels.shape}")
            continue
        difference = int(np.abs(found[name].astype(np.int16) - pixels.astype(np.int16)).max())
        if difference > _MAX_DIFFERENCE:
            problems.append(f"preprocessing: golden image {name} differs by {difference} grey levels")
    return problems


def golden_sha256(pixels: Mapping[str, Pixels]) -> str:
    """Return the hash of golden images' pixels."""
    return hashlib.sha256(np.stack(list(pixels.values())).tobytes()).hexdigest()


def _sample_photo(name: str) -> Pixels:
    with (files("mio_export.parity") / "photos" / name).open("rb") as file, Image.open(file) as photo:
        return np.asarray(photo)


def _saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **({"compress_level": 1} if format == "PNG" else {}), **options)
    return buffer.getvalue()


def _transparent(photo: Image.Image) -> Image.Image:
    alpha = np.linspace(0, 255, photo.width).astype(np.uint8)
    rgba = photo.convert("RGBA")
    rgba.putalpha(Image.fromarray(np.tile(alpha, (photo.height, 1))))
    return rgba


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif
