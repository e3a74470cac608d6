"""The objectives by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mio_export.errors import UsageError
from mio_export.train.objectives.minc import MINCLoss
from mio_export.train.objectives.mio import MIOLoss
from mio_export.train.objectives.spectral import SpectralContrastiveLoss


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """How an objective is built and fed."""

    build: Callable[..., nn.Module]
    defaults: Mapping[str, Any]
    """Arguments for training that differ from the class's own; see ``benchmarks/results`` for the measurements."""
    takes_dim: bool = False
    """Whether the loss needs the projections' width."""
    needs_target: bool = False
    """Whether it compares with a moving average of the encoder."""


OBJECTIVES: dict[str, ObjectiveSpec] = {
    "mio": ObjectiveSpec(build=MIOLoss, defaults={"temperature": 0.2}),
    "minc": ObjectiveSpec(build=MINCLoss, defaults={}, takes_dim=True, needs_target=True),
    "spectral": ObjectiveSpec(build=SpectralContrastiveLoss, defaults={"scale": 10.0, "norm": "sphere"}),
}
"""Every objective."""


def build_objective(name: str, *, output_dim: int, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a loss with its training defaults and the given arguments over them.

    Raises:
        UsageError: an argument is unknown or not allowed.
    """
    spec = OBJECTIVES[name]
    dim = {"dim": output_dim} if spec.takes_dim else {}
    try:
        return spec.build(**dim, **{**spec.defaults, **arguments})
    except TypeError as error:
        raise UsageError(f"objective {name}: {error}") from None
