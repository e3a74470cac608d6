"""What an evaluation finds: figures by row, and how sure their differences are."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mio_export.metrics import HEADLINE_K, BootstrapInterval, paired_bootstrap

UNTRAINED, TRAINED = "untrained", "trained"
VARYING = (UNTRAINED, TRAINED)
"""The rows that the seed of a run changes."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How one way of embedding did."""

    knn: Mapping[int, float] | None
    """Accuracy of the kNN classifier for each k; None without labels."""
    copy_recall: Mapping[int, float]
    """Share of test images whose augmented copy finds them among its k nearest, for each k."""
    linear: float | None = None
    """Accuracy of the linear probe; None without labels, or if probes were not asked for."""
    sgd: float | None = None
    """Accuracy of the SGD probe; None likewise."""
    few_shot: Mapping[int, float] | None = None
    """Mean accuracy of probes on 1, 5 and 10 images of each class; None likewise."""
    correct: npt.NDArray[np.bool_] | None = field(default=None, repr=False, compare=False)
    """Whether kNN with k = 20 named each test image's class, shape (N,); None without labels. Not stored."""

    def columns(self) -> dict[str, float]:
        """Return the figures that tables show, under the names that they have there."""
        few_shot = self.few_shot or {}
        columns = {
            f"kNN (k={HEADLINE_K})": self.knn[HEADLINE_K] if self.knn else None,
            "linear": self.linear,
            "SGD": self.sgd,
            **{f"{shot}-shot": accuracy for shot, accuracy in few_shot.items()},
            **{f"copy recall@{k}": self.copy_recall[k] for k in (1, 10)},
        }
        return {name: value for name, value in columns.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An encoder beside its baselines on one data folder."""

    scores: Mapping[str, Scores]
    """By row: raw pixels, PCA, untrained, trained."""
    differences: Mapping[str, BootstrapInterval]
    """Trained less each other row in kNN (k = 20), with its 95 % interval over test images; empty without labels."""
    num_train: int
    num_test: int
    num_classes: int | None
    failures: tuple[str, ...]
    """Files that could not be read."""
    device: str
    """Where the encoder ran, ``cpu`` or ``cuda``; always in full float32."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        values = asdict(self)
        for scores in values["scores"].values():
            del scores["correct"]
        return values


def knn_differences(systems: Sequence[Mapping[str, Scores]]) -> dict[str, BootstrapInterval]:
    """Return trained less each other row in kNN accuracy (k = 20), with 95 % intervals; empty without labels.

    Args:
        systems: scores by row, on the same test images, of each seed.
    """
    answers = {
        name: [answer for scores in systems if (answer := scores[name].correct) is not None] for name in systems[0]
    }
    trained = answers.pop(TRAINED)
    return {name: paired_bootstrap(np.stack(trained), np.stack(other)) for name, other in answers.items() if trained}


__all__ = ["TRAINED", "UNTRAINED", "VARYING", "Evaluation", "Scores", "knn_differences"]
