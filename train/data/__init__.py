"""Data for training and evaluation: whatever format it comes in, named images that become one uint8 array."""

from mio_export.train.data.dataset import Data
from mio_export.train.data.detect import open_data
from mio_export.train.data.image_set import ImageSet, load_images
from mio_export.train.data.split import Part
from mio_export.train.data.statistics import Geometry, mean_and_std, probe_geometry

__all__ = ["Data", "Geometry", "ImageSet", "Part", "load_images", "mean_and_std", "open_data", "probe_geometry"]
