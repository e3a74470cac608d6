"""Embedding: sources of images into a store of vectors."""

from mio_export.embedding.measuring import Throughput, measure
from mio_export.embedding.merging import MergeResult, merge
from mio_export.embedding.run import EmbedResult, embed

__all__ = ["EmbedResult", "MergeResult", "Throughput", "embed", "measure", "merge"]
