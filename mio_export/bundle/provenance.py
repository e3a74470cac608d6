"""What a single artifact says of itself, read back from whichever place its format has for it."""

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

from mio_export.bundle.onnx_file import read_onnx
from mio_export.bundle.sidecar import read_sidecar, sidecar_path
from mio_export.errors import GateError, UsageError, one_line

KEY = "mio-export"
"""Name of the entry in ONNX metadata, and of the extra file (with ``.json``) in the archives of PyTorch."""


_MAX_BYTES = 16 * 1024**2


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
        raise UsageError(f"{path} has no metadata of mio-export; it was not made by it")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise GateError(f"{path} is damaged: what it says of itself is not the JSON that it should be")
    return values


def _from_archive(path: Path) -> str | None:
    if not zipfile.is_zipfile(path):
        raise UsageError(f"{path} is neither a bundle nor an embedding store, nor an artifact of a bundle")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(f"/extra/{KEY}.json")]
            if entries and entries[0].file_size > _MAX_BYTES:
                raise GateError(f"{path} is damaged: it says {entries[0].file_size:,} bytes of itself")
            return archive.read(entries[0]).decode() if entries else None
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise GateError(f"{path} is damaged: {one_line(error, 200)}") from None


__all__ = ["KEY", "read_provenance"]
