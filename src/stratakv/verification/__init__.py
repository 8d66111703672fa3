"""Proof that what comes out of a cache is right."""

from stratakv.verification.consistency import verify
from stratakv.verification.report import CutResult, Divergence, VerifyReport

__all__ = ["CutResult", "Divergence", "VerifyReport", "verify"]
