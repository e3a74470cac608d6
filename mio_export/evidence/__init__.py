"""What a bundle's parity reports say, and whether it fits the manifest beside them; read without torch."""

from mio_export.evidence.budget import Budget, budget_for
from mio_export.evidence.check import artifact_problems
from mio_export.evidence.report import Comparison, Evidence, ParityReport

__all__ = ["Budget", "Comparison", "Evidence", "ParityReport", "artifact_problems", "budget_for"]
