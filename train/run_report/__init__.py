"""The page that a training run ends with."""

from mio_export.train.run_report.outputs import write_outputs
from mio_export.train.run_report.report import write_report
from mio_export.train.run_report.views_sheet import views_sheet

__all__ = ["views_sheet", "write_outputs", "write_report"]
