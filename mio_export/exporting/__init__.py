"""Exporting: from an encoder to a bundle of proved artifacts."""

from mio_export.exporting.export import ExportResult, export

__all__ = ["ExportResult", "export"]
