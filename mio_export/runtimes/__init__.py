"""Runtimes: one way to embed with every artifact."""

from mio_export.runtimes.base import Embeddings, Runtime
from mio_export.runtimes.registry import BACKENDS, Choice, choose, choose_elsewhere, open_runtime

__all__ = ["BACKENDS", "Choice", "Embeddings", "Runtime", "choose", "choose_elsewhere", "open_runtime"]
