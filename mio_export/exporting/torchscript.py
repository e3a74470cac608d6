"""An encoder as TorchScript: legacy, since PyTorch deprecates it and Python 3.14 has no tracer."""

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from mio_export.bundle.provenance import KEY
from mio_export.errors import MissingBackendError
from mio_export.exporting.traceable import Traceable
from mio_export.models import Encoder

_MANGLED = re.compile(rb"___torch_mangle_(\d+)")


def torchscript_from_encoder(
    encoder: Encoder, path: Path, *, precision: Literal["fp32", "bf16"], max_batch: int, provenance: str
) -> None:
    """Write a TorchScript file that takes uint8 (batch, H, W, C) and gives float32 (batch, D), for any batch.

    Args:
        encoder: in eval mode, on the CPU.
        path: where to write.
        precision: what it computes in.
        max_batch: unused: the batch dimension is free.
        provenance: JSON text for the file ``mio-export.json`` in the archive.

    Raises:
        MissingBackendError: this Python has no TorchScript tracer.
    """
    del max_batch
    example = torch.zeros((2, *encoder.preprocess.shape), dtype=torch.uint8)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            traced = torch.jit.freeze(torch.jit.trace(Traceable(encoder, precision), example, check_trace=False))
            torch.jit.save(traced, str(path), _extra_files={f"{KEY}.json": provenance})
    except NotImplementedError as error:
        raise MissingBackendError(f"TorchScript is not available on this Python; use -f onnx ({error})") from None
    _make_reproducible(path)


def _make_reproducible(path: Path) -> None:
    """Write the archive again without what depends on this process and this machine.

    Left out are the debug records, which hold source paths, and the serialisation id, which hashes them; the counters
    that PyTorch puts into class names are counted from 0.
    """
    raw = path.with_suffix(".raw")
    path.rename(raw)
    with zipfile.ZipFile(raw) as archive:
        names = [name for name in archive.namelist() if not name.endswith((".debug_pkl", ".data/serialization_id"))]
        records = {name: archive.read(name) for name in names}
    counters = {counter for name in names for counter in _MANGLED.findall(name.encode())}
    order = {counter: b"%d" % index for index, counter in enumerate(sorted(counters, key=int))}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            if name.endswith((".py", "/data.pkl")):
                data = _renamed(data, order)
            archive.writestr(zipfile.ZipInfo(_renamed(name.encode(), order).decode()), data)
    raw.unlink()


def _renamed(text: bytes, order: Mapping[bytes, bytes]) -> bytes:
    return _MANGLED.sub(lambda match: b"___torch_mangle_" + order.get(match[1], match[1]), text)
