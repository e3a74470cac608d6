"""The objectives: one file, one loss, one test each."""

from mio_export.train.objectives.base import Monitor, Objective, Quantity
from mio_export.train.objectives.minc import MINCLoss
from mio_export.train.objectives.mio import MIOLoss
from mio_export.train.objectives.prediction import PredictionLoss
from mio_export.train.objectives.simclr import SimCLRLoss
from mio_export.train.objectives.spectral import SpectralContrastiveLoss

__all__ = [
    "MINCLoss",
    "MIOLoss",
    "Monitor",
    "Objective",
    "PredictionLoss",
    "Quantity",
    "SimCLRLoss",
    "SpectralContrastiveLoss",
]
