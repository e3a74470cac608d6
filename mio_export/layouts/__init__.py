"""A store in the layouts that other programs read."""

from mio_export.layouts.dtype import DType
from mio_export.layouts.writing import Layout, LayoutResult, write_layout

__all__ = ["DType", "Layout", "LayoutResult", "write_layout"]
