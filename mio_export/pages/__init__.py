"""HTML pages, each a single file that fetches nothing: templates, charts, tables and thumbnails."""

from mio_export.pages.charts import Line, line_chart, log_histogram, number_label
from mio_export.pages.html import Cell, Figure, Row, render
from mio_export.pages.thumbnails import Thumbnail, data_url, thumbnail

__all__ = [
    "Cell",
    "Figure",
    "Line",
    "Row",
    "Thumbnail",
    "data_url",
    "line_chart",
    "log_histogram",
    "number_label",
    "render",
    "thumbnail",
]
