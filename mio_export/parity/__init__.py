"""Parity: proof that an artifact gives the encoder's embeddings."""

from mio_export.parity.report import BUDGETS, Budget, Comparison, ParityReport, compare
from mio_export.parity.verification import Verification, verify

__all__ = ["BUDGETS", "Budget", "Comparison", "ParityReport", "Verification", "compare", "verify"]
