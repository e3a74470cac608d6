"""Where images come from: folders, lists of paths, tar and zip files, Parquet, here or behind a URL."""

from mio_export.image_formats.supported import HEIF_HINT, image_suffixes
from mio_export.sources.folder import list_images
from mio_export.sources.listing import Listing, SourceFile
from mio_export.sources.local import read_file
from mio_export.sources.opening import list_sources, named
from mio_export.sources.sampling import evenly_spaced

__all__ = [
    "HEIF_HINT",
    "Listing",
    "SourceFile",
    "evenly_spaced",
    "image_suffixes",
    "list_images",
    "list_sources",
    "named",
    "read_file",
]
