"""A store in the layouts that other programs read."""

from mio_export.layouts.casting import DType
from mio_export.layouts.writing import Layout, LayoutResult, write_layout

__all__ = ["DType", "Layout", "LayoutResult", "write_layout"]
