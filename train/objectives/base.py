"""What every objective has in common: the contract between a loss, the training loop and the report of a run."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """How the report of a run presents a number that an objective gives for each epoch."""

    title: str
    """Its name, with the unit."""
    meaning: str
    """What it is and what good values look like, in full sentences."""


class Monitor:
    """Watches what is particular to one objective while it trains; this base class watches nothing."""

    def measure(self, projections: Tensor) -> dict[str, float]:
        """Return a value for each key of the objective's ``monitored``.

        Args:
            projections: of the first views, then of the second views of N images, shape (2N, D), floating; by the
                target encoder if there is one, else by the online encoder, with batch norm in training mode.
        """
        del projections
        return {}

    def alarm(self, measures: Mapping[str, float]) -> str | None:
        """Return what the measures say is going wrong, in one line; None if nothing is."""
        del measures
        return None

    def intervene(self, measures: Mapping[str, float]) -> str | None:
        """Adapt the objective to the measures; return what was done, in one line, or None."""
        del measures
        return None

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain values."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state`` returned; ``state`` may hold other keys too."""


class Objective(nn.Module, ABC):
    """A loss on the projections of two views of each image of a batch.

    A new objective is one file with a subclass and one line in ``registry.OBJECTIVES``; ``forward`` is all that it
    must define::

        class Hinge(Objective):
            def forward(self, projections_0: Tensor, projections_1: Tensor) -> Tensor:
                cosines = F.cosine_similarity(at_least_float32(projections_0), at_least_float32(projections_1))
                return (1 - cosines).clamp_min(0).mean()
    """

    information: ClassVar[Quantity | None] = None
    """What ``mutual_information`` estimates; None if it estimates nothing."""
    monitored: ClassVar[Mapping[str, Quantity]] = {}
    """What the monitor measures, by its key in ``metrics.jsonl``."""
    ordered: bool = False
    """Whether the projections come out in the order of their importance, so that the first few can be kept."""

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a batch, a 0-dim tensor.

        The arguments are positional, floating and of shape (N, D): the online projections of the first views and of
        the second, through the predictor if there is one; with a target also the target projections of both.
        """

    def mutual_information(self, value: float, *, num_images: int) -> float | None:
        """Return the estimate that ``information`` describes; None without one.

        Args:
            value: the loss, averaged over an epoch.
            num_images: N, images in a batch, of all processes.
        """
        del value, num_images
        return None

    def monitor(self) -> Monitor:
        """Return what watches this objective in training; one whose measures ``monitored`` names."""
        return Monitor()
