"""Proof that what comes out of a cache is right."""

from stratakv.verification.consistency import verify
from stratakv.verification.fidelity import FidelityReport, fidelity
from stratakv.verification.report import CutResult, Divergence, VerifyReport
from stratakv.verification.scoring import Scorer, Scores

__all__ = ["CutResult", "Divergence", "FidelityReport", "Scorer", "Scores", "VerifyReport", "fidelity", "verify"]
