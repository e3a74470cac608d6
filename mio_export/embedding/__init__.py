"""Embedding: folders of images into a store of vectors."""

from mio_export.embedding.folder import EmbedResult, embed

__all__ = ["EmbedResult", "embed"]
