"""Which image formats are decoded here: those that Pillow decodes by itself, in this process."""

import functools

from mio_export.extras import install_command

HEIF_SUFFIXES = frozenset({".heic", ".heif", ".heics", ".heifs", ".hif"})
HEIF_HINT = f"HEIC needs the extra: {install_command('heic')}"

_FIRST = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Tried first, as they are the most frequent; each begins with bytes of its own."""
_NOT_DECODED = {
    "EPS": "Pillow runs Ghostscript for it: an outside program that executes what the file says",
    "IPTC": "a wrapper that is opened as whatever lies in it, EPS among others",
    "MPEG": "Pillow reads the header of a video and has no decoder",
}
"""What Pillow's registry cannot tell: that a format has a reader, and why the reader is of no use here."""
_READ_AS = {"MPO": "JPEG"}
"""Formats with a suffix of their own that the reader of another opens."""


@functools.cache
def register_heif() -> bool:
    """Let Pillow read HEIC, if the extra is installed; return whether it is."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats that are decoded, as ``Image.open(formats=...)`` takes them.

    Left out are stubs, which recognise a file that a plugin would have to decode, and readers that run an outside
    program. HEIF is among them if its extra is installed.
    """
    from PIL import Image, ImageFile

    register_heif()
    Image.init()

    def is_stub(name: str) -> bool:
        reader = Image.OPEN[name][0]
        return isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile)

    names = [name for name in Image.ID if name in Image.OPEN and name not in _NOT_DECODED and not is_stub(name)]
    return tuple(sorted(names, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST)))


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the lower-case suffixes of ``readable_formats``; files with others are no images here."""
    from PIL import Image

    formats = readable_formats()
    return frozenset(
        suffix for suffix, name in Image.registered_extensions().items() if _READ_AS.get(name, name) in formats
    )


__all__ = ["HEIF_HINT", "HEIF_SUFFIXES", "image_suffixes", "readable_formats", "register_heif"]
