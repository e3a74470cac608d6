"""mio-export: train a self-supervised image encoder, export it with proof, and embed images with it.

The names below are the whole public interface, with ``mio_export.train.objectives``. Each is imported when it is first
used, so that importing the package costs nothing.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mio_export.embedding import embed
    from mio_export.exporting import export
    from mio_export.models import load_encoder
    from mio_export.parity import verify
    from mio_export.runtimes import open_runtime
    from mio_export.store import load_embeddings

__all__ = ["embed", "export", "load_embeddings", "load_encoder", "open_runtime", "verify"]

# since 1.31 ONNX Runtime otherwise reports its use to Microsoft; it looks when it is imported
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "embed": "mio_export.embedding",
    "export": "mio_export.exporting",
    "load_embeddings": "mio_export.store",
    "load_encoder": "mio_export.models",
    "open_runtime": "mio_export.runtimes",
    "verify": "mio_export.parity",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mio_export' has no attribute {name!r}")
    from mio_export.extras import naming_extras

    with naming_extras():
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
