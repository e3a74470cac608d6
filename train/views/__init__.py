"""Augmented views of a whole batch at once, on its device, every image with parameters of its own."""

from mio_export.train.views.batch import random_view, two_views
from mio_export.train.views.config import PRESETS, ViewConfig, view_values, view_warnings

__all__ = ["PRESETS", "ViewConfig", "random_view", "two_views", "view_values", "view_warnings"]
