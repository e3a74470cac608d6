"""Embedding: sources of images into a store of vectors."""

from mio_export.embedding.merging import MergeResult, merge
from mio_export.embedding.run import EmbedResult, embed
from mio_export.embedding.throughput import Throughput, measure

__all__ = ["EmbedResult", "MergeResult", "Throughput", "embed", "measure", "merge"]
