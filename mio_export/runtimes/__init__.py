"""Runtimes: one way to embed with every artifact."""

from mio_export.runtimes.backends import BACKENDS
from mio_export.runtimes.base import Embeddings, Runtime
from mio_export.runtimes.opening import Selected, open_runtime
from mio_export.runtimes.selection import Choice, choose, choose_elsewhere

__all__ = ["BACKENDS", "Choice", "Embeddings", "Runtime", "Selected", "choose", "choose_elsewhere", "open_runtime"]
