"""Which names are images: those whose suffix Pillow can read."""

import posixpath

HEIF_SUFFIXES = frozenset({".heic", ".heif", ".heics", ".heifs", ".hif"})
HEIF_HINT = "HEIC needs the extra: pip install 'mio-export[heic]'"


def image_suffixes() -> frozenset[str]:
    """Return the lower-case suffixes that Pillow can read here, HEIC's among them if its extra is installed."""
    from PIL import Image

    from mio_export.formats import register_heif

    register_heif()
    Image.init()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN)


def suffix_of(name: str) -> str:
    """Return what a name ends in, from its last dot on, in lower case; empty if there is none."""
    return posixpath.splitext(name)[1].lower()


__all__ = ["HEIF_HINT", "HEIF_SUFFIXES", "image_suffixes", "suffix_of"]
