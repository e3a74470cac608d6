"""A model repository of a bundle for Triton Inference Server's own containers."""

from mio_export.serving.triton.writing import Deployment, write_repository

__all__ = ["Deployment", "write_repository"]
