"""What a single artifact says of itself, read back from whichever place its format has for it."""

import json
import zipfile
from pathlib import Path
from typing import Any

from mio_export.errors import GateError, UsageError
from mio_export.onnx_file import read_onnx
from mio_export.sidecar import read_sidecar, sidecar_path

KEY = "mio-export"
"""Name of the entry in ONNX metadata, and of the extra file (with ``.json``) in the archives of PyTorch."""


def read_provenance(path: Path) -> dict[str, Any]:
    """Return what every artifact of a bundle has in common: encoder, preprocessing, weights, space, batch range.

    Args:
        path: an ONNX, TorchScript or ``.pt2`` file, or an engine with its sidecar beside it.

    Raises:
        UsageError: the file is none of these, or was not made by mio-export.
        GateError: it is damaged.
    """
    if sidecar_path(path).is_file():
        return dict(read_sidecar(path).provenance)
    text = read_onnx(path).metadata.get(KEY) if path.suffix == ".onnx" else _from_archive(path)
    if text is None:
        raise UsageError(f"{path} says nothing of itself; it was not made by mio-export")
    try:
        values: dict[str, Any] = json.loads(text)
    except ValueError:
        raise GateError(f"{path} is damaged: what it says of itself is not JSON") from None
    return values


def _from_archive(path: Path) -> str | None:
    if not zipfile.is_zipfile(path):
        raise UsageError(f"{path} is neither a bundle nor an embedding store, nor an artifact of a bundle")
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(f"/{KEY}.json")]
        return archive.read(names[0]).decode() if names else None


__all__ = ["KEY", "read_provenance"]
