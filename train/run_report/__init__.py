"""The page that a training run ends with."""

from mio_export.train.run_report.report import METRICS, RECIPE, REPORT, SPECTRUM, VIEWS, write_report
from mio_export.train.run_report.views_sheet import views_sheet

__all__ = ["METRICS", "RECIPE", "REPORT", "SPECTRUM", "VIEWS", "views_sheet", "write_report"]
