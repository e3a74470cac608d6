"""Parity: proof that an artifact gives the encoder's embeddings."""

from mio_export.parity.budget import Budget, budget_for
from mio_export.parity.report import Comparison, ParityReport, compare
from mio_export.parity.verification import Verification, verify

__all__ = ["Budget", "Comparison", "ParityReport", "Verification", "budget_for", "compare", "verify"]
