"""Exporting: from an encoder to a bundle of proved artifacts."""

from mio_export.exporting.bundling import ExportResult, export

__all__ = ["ExportResult", "export"]
