"""Serving: a bundle behind an inference server."""

from mio_export.serving.repository import Deployment, write_repository

__all__ = ["Deployment", "write_repository"]
