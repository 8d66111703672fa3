"""Repeated timings and their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """What was measured at one length, in seconds.

    What disturbs a measurement adds to it, so the smallest sample is nearest to the cost of the work itself, and the
    gap from there to the lower quartile tells how far it can be trusted.
    """

    length: int
    median: float
    smallest: float
    largest: float
    noise: float  # (lower quartile - smallest) / smallest
    n: int

    @classmethod
    def of(cls, length: int, seconds: Sequence[float]) -> Timing:
        """Summarise one or more samples."""
        median = statistics.median(seconds)
        smallest = min(seconds)
        quartile = statistics.quantiles(seconds, n=4, method="inclusive")[0] if len(seconds) > 1 else smallest
        return cls(length, median, smallest, max(seconds), quartile / smallest - 1, len(seconds))

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON report."""
        return {
            "length": self.length,
            "median_seconds": self.median,
            "min_seconds": self.smallest,
            "max_seconds": self.largest,
            "noise": self.noise,
            "samples": self.n,
        }


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
