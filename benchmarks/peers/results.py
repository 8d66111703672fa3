"""What was measured, as plain data. The JSON is described in `benchmarks.peers.run`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median, ends and the samples themselves: one a round."""
    return {
        "median": statistics.median(samples),
        "smallest": min(samples),
        "largest": max(samples),
        "samples": list(samples),
    }


@dataclass
class LengthCell:
    """One peer at one length of prompt."""

    prefill: list[float] = field(default_factory=list)  # tokens a second, by round
    decode: list[float] = field(default_factory=list)  # ms a token: the median step, by round
    first_tokens: list[int] = field(default_factory=list)
    reason: str | None = None  # why it has no numbers, or not all of them

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON report."""
        return {
            "prefill_tokens_per_second": spread(self.prefill) if self.prefill else None,
            "decode_ms_per_token": spread(self.decode) if self.decode else None,
            "first_tokens": self.first_tokens,
            "reason": self.reason,
        }


@dataclass
class BatchCell:
    """One peer at one number of requests."""

    output: list[float] = field(default_factory=list)  # tokens a second, by round
    first_tokens: list[int] = field(default_factory=list)  # of each request, one
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON report."""
        return {
            "output_tokens_per_second": spread(self.output) if self.output else None,
            "first_tokens": self.first_tokens,
            "reason": self.reason,
        }
