"""What a name ends in, which tells whether it is an image's."""

import posixpath


def suffix_of(name: str) -> str:
    """Return what a name ends in, from its last dot on, in lower case; empty if there is none."""
    return posixpath.splitext(name)[1].lower()


__all__ = ["suffix_of"]
