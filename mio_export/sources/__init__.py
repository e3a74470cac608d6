"""Where images come from: folders, lists of paths, tar and zip files, Parquet, here or behind a URL."""

from mio_export.formats import HEIF_HINT, image_suffixes
from mio_export.sources.folder import list_images
from mio_export.sources.listing import Listing, SourceFile
from mio_export.sources.on_disk import read_file
from mio_export.sources.several import list_sources, named
from mio_export.sources.spreading import spread

__all__ = [
    "HEIF_HINT",
    "Listing",
    "SourceFile",
    "image_suffixes",
    "list_images",
    "list_sources",
    "named",
    "read_file",
    "spread",
]
