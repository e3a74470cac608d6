"""Searching: the nearest stored images of a query, and a gallery of what a store holds."""

from mio_export.searching.answers import Answer, answer
from mio_export.searching.gallery import GalleryResult, write_gallery
from mio_export.searching.neighbors import Neighbor, search

__all__ = ["Answer", "GalleryResult", "Neighbor", "answer", "search", "write_gallery"]
