"""The precision of objectives, and the norm rules that turn projections into the features φ of the spectral ones."""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mio_export.errors import UsageError

Norm = Literal["sphere", "ball", "none"]


def at_least_float32(projections: Tensor) -> Tensor:
    """Return projections in float32, or wider if they are: no objective is computed in half precision."""
    return projections.to(torch.promote_types(projections.dtype, torch.float32))


def check_norm(norm: str, scale: float) -> None:
    """Refuse an unknown norm rule or a scale that is not positive.

    Raises:
        UsageError: either is so.
    """
    if norm not in get_args(Norm):
        raise UsageError(f"norm must be one of {', '.join(get_args(Norm))}; got {norm!r}")
    if scale <= 0:
        raise UsageError(f"scale must be above 0, got {scale}")


def apply_norm(projections: Tensor, norm: Norm, scale: float) -> Tensor:
    """Return φ for the given norm rule.

    Args:
        projections: shape (N, D), floating.
        norm: ``"none"`` (φ = z), ``"sphere"`` (φ = √s · z/‖z‖) or ``"ball"`` (norms above √s are clipped to √s).
        scale: the s of the rule, > 0; unused by ``"none"``.

    Returns:
        φ, shape (N, D), float32 or wider.
    """
    projections = at_least_float32(projections)
    radius = math.sqrt(scale)
    if norm == "none":
        return projections
    if norm == "sphere":
        return radius * F.normalize(projections, dim=1)
    norms: Tensor = torch.linalg.vector_norm(projections, dim=1, keepdim=True)
    clipped: Tensor = projections * (radius / norms.clamp_min(radius))
    return clipped
