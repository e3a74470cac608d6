"""An encoder as TorchScript: legacy, since PyTorch deprecates it and Python 3.14 has no tracer."""

import warnings
import zipfile
from importlib.metadata import version
from pathlib import Path

import torch

from mio_export.errors import MissingBackendError
from mio_export.models import Encoder

PROVENANCE_FILE = "mio-export.json"


def torchscript_from_encoder(encoder: Encoder, path: Path, *, max_batch: int, provenance: str) -> dict[str, str]:
    """Write a TorchScript file that takes uint8 (batch, H, W, C) and gives float32 (batch, D), for any batch.

    Args:
        encoder: in eval mode, on the CPU.
        path: where to write.
        max_batch: unused: the batch dimension is free.
        provenance: JSON text for the file ``mio-export.json`` in the archive.

    Returns:
        Versions of the libraries that wrote it.

    Raises:
        MissingBackendError: this Python has no TorchScript tracer.
    """
    del max_batch
    example = torch.zeros((2, *encoder.preprocess.shape), dtype=torch.uint8)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            traced = torch.jit.freeze(torch.jit.trace(encoder, example, check_trace=False))
            torch.jit.save(traced, str(path), _extra_files={PROVENANCE_FILE: provenance})
    except NotImplementedError as error:
        raise MissingBackendError(f"TorchScript is not available on this Python; use -f onnx ({error})") from None
    _strip_build_paths(path)
    return {"torch": version("torch")}


def _strip_build_paths(path: Path) -> None:
    """Write the archive again without its debug records, which hold source paths of this machine."""
    whole = path.with_suffix(".with-paths")
    path.rename(whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            if not name.endswith(".debug_pkl"):
                new.writestr(zipfile.ZipInfo(name), old.read(name))
    whole.unlink()
