"""Parity: proof that an artifact gives the encoder's embeddings."""

from mio_export.evidence import Budget, Comparison, ParityReport, budget_for
from mio_export.parity.report import compare
from mio_export.parity.verification import EVERYTHING, Verification, verify

__all__ = [
    "EVERYTHING",
    "Budget",
    "Comparison",
    "ParityReport",
    "Verification",
    "budget_for",
    "compare",
    "verify",
]
