"""The versions that decide the last bits of a vector: of whatever decodes images and of whatever embeds them."""

from collections.abc import Mapping

from mio_export.runtimes.backends import BACKENDS, first_distribution

_DECODERS = {"libwebp": "webp", "libavif": "avif", "openjpeg": "jpg_2000"}
"""Pillow's libraries for lossy formats beside JPEG, and what ``PIL.features`` calls them."""


def versions_here(runtime: str) -> dict[str, str]:
    """Return the versions, by name, of what decodes and embeds in this process with a runtime."""
    import PIL
    from PIL import features

    turbo = features.check("libjpeg_turbo")
    found = {
        "mio-export": _version("mio-export"),
        "pillow": PIL.__version__,
        "libjpeg-turbo" if turbo else "libjpeg": features.version("libjpeg_turbo" if turbo else "jpg"),
    }
    found |= {name: features.version(feature) for name, feature in _DECODERS.items() if features.check(feature)}
    found["pillow-heif"] = _version("pillow-heif")
    backend = BACKENDS[runtime]
    found["torch" if backend.library == "torch" else runtime] = backend.version
    return {name: text for name, text in found.items() if text is not None}


def difference(ours: Mapping[str, str], others: Mapping[str, str]) -> str:
    """Return in words how other versions differ from ours, such as ``pillow 12.0.0 (here 13.0.0)``."""
    if not others:
        return "versions that were not recorded"
    names = [name for name in {**ours, **others} if ours.get(name) != others.get(name)]
    return ", ".join(f"{name} {others.get(name, 'absent')} (here {ours.get(name, 'absent')})" for name in names)


def distribution_of(runtime: str) -> str:
    """Return the name of the package that a runtime's library comes from: that which is installed, or usual."""
    names = BACKENDS[runtime].distributions
    found = first_distribution(names)
    return found[0] if found else names[-1]


def _version(distribution: str) -> str | None:
    found = first_distribution((distribution,))
    return found[1] if found else None
