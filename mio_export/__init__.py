"""mio-export: train a self-supervised image encoder, export it with proof, and embed images with it.

The names in ``__all__`` are the whole public interface; everything else is private. The functions and classes are
imported when they are first used, so that importing the package costs nothing.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from mio_export.errors import (
    GateError,
    MioError,
    MissingBackendError,
    OutOfMemoryError,
    SpaceError,
    UsageError,
)

if TYPE_CHECKING:
    from mio_export.benchmark import bench
    from mio_export.bundle import load_bundle
    from mio_export.embedding import embed, merge
    from mio_export.exporting import export
    from mio_export.layouts import write_layout
    from mio_export.models import load_encoder
    from mio_export.parity import verify
    from mio_export.preprocess import Preprocess
    from mio_export.runtimes import open_runtime
    from mio_export.searching import answer, search, write_gallery
    from mio_export.serving import RemoteEncoder
    from mio_export.store import load_embeddings
    from mio_export.train import evaluate, train
    from mio_export.train.data import load_images, open_data
    from mio_export.train.objectives import MINCLoss, MIOLoss, SpectralContrastiveLoss

__all__ = [
    "GateError",
    "MINCLoss",
    "MIOLoss",
    "MioError",
    "MissingBackendError",
    "OutOfMemoryError",
    "Preprocess",
    "RemoteEncoder",
    "SpaceError",
    "SpectralContrastiveLoss",
    "UsageError",
    "answer",
    "bench",
    "embed",
    "evaluate",
    "export",
    "load_bundle",
    "load_embeddings",
    "load_encoder",
    "load_images",
    "merge",
    "open_data",
    "open_runtime",
    "search",
    "train",
    "verify",
    "write_gallery",
    "write_layout",
]

# since 1.31 ONNX Runtime otherwise reports its use to Microsoft; it looks when it is imported
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "MINCLoss": "mio_export.train.objectives",
    "MIOLoss": "mio_export.train.objectives",
    "Preprocess": "mio_export.preprocess",
    "RemoteEncoder": "mio_export.serving",
    "SpectralContrastiveLoss": "mio_export.train.objectives",
    "answer": "mio_export.searching",
    "bench": "mio_export.benchmark",
    "embed": "mio_export.embedding",
    "evaluate": "mio_export.train",
    "export": "mio_export.exporting",
    "load_bundle": "mio_export.bundle",
    "load_embeddings": "mio_export.store",
    "load_encoder": "mio_export.models",
    "load_images": "mio_export.train.data",
    "merge": "mio_export.embedding",
    "open_data": "mio_export.train.data",
    "open_runtime": "mio_export.runtimes",
    "search": "mio_export.searching",
    "train": "mio_export.train",
    "verify": "mio_export.parity",
    "write_gallery": "mio_export.searching",
    "write_layout": "mio_export.layouts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mio_export' has no attribute {name!r}")
    from mio_export.extras import naming_extras

    with naming_extras():
        home = importlib.import_module(_HOMES[name])
        is_home = _HOMES[name] == f"mio_export.{name}"  # ``train`` is a package that can be called
        return home if is_home else getattr(home, name)


def __dir__() -> list[str]:
    return __all__
