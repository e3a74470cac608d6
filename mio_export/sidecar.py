"""The sidecar of a TensorRT engine: which library, GPU and batches it was built for, in JSON beside the engine."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from mio_export.errors import GateError, UsageError
from mio_export.files import write_text
from mio_export.schema import parse_json

SCHEMA_VERSION = 1
_STRICT: dict[str, Any] = {"extra": "forbid"}

Library = Literal["tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Batch sizes of an engine, in images."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

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


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The whole of ``ENGINE.json``."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT

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

    def to_json(self) -> str:
        """Return the sidecar's text."""
        return json.dumps(asdict(self), indent=2) + "\n"


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
        text = path.read_bytes()
    except FileNotFoundError:
        raise GateError(f"{engine} has no {path.name} beside it, which says what it runs on; export it again") from None
    return parse_json(text, Sidecar, where=path, newest=SCHEMA_VERSION)


def write_sidecar(engine: Path, sidecar: Sidecar) -> None:
    """Write the sidecar beside an engine, whole or not at all."""
    write_text(sidecar_path(engine), sidecar.to_json())


__all__ = ["Library", "Profile", "Sidecar", "read_sidecar", "sidecar_path", "write_sidecar"]
