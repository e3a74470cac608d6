"""The sidecar of a TensorRT engine: which library, GPU and batches it was built for, in JSON beside the engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mio_export.errors import GateError, UsageError
from mio_export.schema import read_json, strict, write_json

SCHEMA_VERSION = 1

Library = Literal["tensorrt", "tensorrt-rtx"]


@strict
@dataclass(frozen=True, kw_only=True)
class Profile:
    """Batch sizes of an engine, in images."""

    min: int
    """Smallest batch that it takes."""
    opt: int
    """The batch that it is fastest at."""
    max: int
    """Largest batch that it takes."""

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise UsageError(
                f"a profile's batches must be 1 <= min <= opt <= max, got {self.min}, {self.opt}, {self.max}"
            )


@strict
@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The whole of ``ENGINE.json``."""

    schema_version: int = SCHEMA_VERSION
    library: Library
    library_version: str
    """The one version that runs the engine: that of the library that built it."""
    capability: str
    """Compute capability of the GPUs that it runs on, such as ``8.6``."""
    profile: Profile
    engine_sha256: str
    provenance: Mapping[str, Any]
    """What every artifact says of itself."""


def sidecar_path(engine: Path) -> Path:
    """Return where the sidecar of an engine lies: its name and ``.json``."""
    return engine.with_name(f"{engine.name}.json")


def read_sidecar(engine: Path) -> Sidecar:
    """Read the sidecar of an engine; the engine itself is not opened.

    Raises:
        GateError: it is missing or damaged.
        MioError: it was written by a newer mio-export.
    """
    path = sidecar_path(engine)
    try:
        return read_json(path, Sidecar, newest=SCHEMA_VERSION)
    except FileNotFoundError:
        raise GateError(f"{engine} has no {path.name} beside it, which says what it runs on; export it again") from None


def write_sidecar(engine: Path, sidecar: Sidecar) -> None:
    """Write the sidecar beside an engine, whole or not at all."""
    write_json(sidecar_path(engine), sidecar)


__all__ = ["Library", "Profile", "Sidecar", "read_sidecar", "sidecar_path", "write_sidecar"]
