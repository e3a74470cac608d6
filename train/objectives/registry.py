"""The objectives by name: which loss, and what it is fed with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mio_export.errors import UsageError
from mio_export.train.objectives.base import Objective, Quantity
from mio_export.train.objectives.minc import MINCLoss
from mio_export.train.objectives.mio import MIOLoss
from mio_export.train.objectives.prediction import PredictionLoss
from mio_export.train.objectives.simclr import SimCLRLoss
from mio_export.train.objectives.spectral import SpectralContrastiveLoss


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """How an objective is built and fed.

    A loss takes the online projections of both views (through the predictor, if there is one) and, with a target, the
    target projections of both views.
    """

    build: type[Objective]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for training that differ from the class's own; ``docs/objectives.md`` says what they rest on."""
    takes_dim: bool = False
    """Whether the loss needs the projections' width."""
    target: Literal["none", "average", "online"] = "none"
    """What the projections are compared with: each other, those of a moving average of the encoder, or the online ones
    with their gradient stopped."""
    predictor: Literal["none", "linear", "mlp"] = "none"
    """What stands between online projections and the loss."""
    looks_at: str = "compares all images of a batch"
    """What the loss does beyond one image at a time, for messages; empty if nothing."""

    @property
    def per_image(self) -> bool:
        """Whether the loss of a batch is the mean of its images' own, so that gradients may be added over batches."""
        return not self.looks_at


OBJECTIVES: dict[str, ObjectiveSpec] = {
    "mio": ObjectiveSpec(build=MIOLoss, defaults={"temperature": 0.2}),
    "minc": ObjectiveSpec(
        build=MINCLoss,
        takes_dim=True,
        target="average",
        looks_at="takes a batch's second moment into account before it is used",
    ),
    "spectral": ObjectiveSpec(build=SpectralContrastiveLoss, defaults={"scale": 10.0, "norm": "sphere"}),
    "simclr": ObjectiveSpec(build=SimCLRLoss),
    "byol": ObjectiveSpec(build=PredictionLoss, target="average", predictor="mlp", looks_at=""),
    "linear-byol": ObjectiveSpec(build=PredictionLoss, target="average", predictor="linear", looks_at=""),
    "simsiam": ObjectiveSpec(build=PredictionLoss, target="online", predictor="mlp", looks_at=""),
}
"""Every objective."""


def monitored_quantities() -> dict[str, Quantity]:
    """Return what any objective monitors, by its key in ``metrics.jsonl``; every run's metrics have all of them."""
    return {key: quantity for spec in OBJECTIVES.values() for key, quantity in spec.build.monitored.items()}


def build_objective(name: str, *, output_dim: int, arguments: Mapping[str, Any]) -> Objective:
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
