"""The last tokens, and optionally the very first ones.

A window of W lets the query at position i see positions i-W+1 .. i. Sinks are the first tokens of a sequence, which
many models need to stay sane (StreamingLLM, Xiao et al. 2023, arXiv:2309.17453).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stratakv.errors import ConfigurationError
from stratakv.plan import KeepPlan, Run, clip_runs
from stratakv.policies.base import RetentionPolicy
from stratakv.policies.whole_blocks import whole_blocks
from stratakv.spec import Retention
from stratakv.units import whole


class Window(RetentionPolicy):
    """Keeps the last `size` tokens and the first `sinks`; frees whole blocks, so nothing is ever moved.

    Args:
        size: keys that a query sees, itself included; one number, or one for each KV head (the same in every layer).
        sinks: first tokens that are never dropped and that every query sees.

    Raises:
        ConfigurationError: a size below 1 or negative sinks.
    """

    name = "window"

    def __init__(self, size: int | Sequence[int], sinks: int = 0) -> None:
        sizes = size if isinstance(size, Sequence) and not isinstance(size, str | bytes) else (size,)
        self.sizes = tuple(whole("the size of a window", each) for each in sizes)
        self.sinks = whole("sinks", sinks)
        if not self.sizes or min(self.sizes) < 1 or self.sinks < 0:
            raise ConfigurationError(f"a window needs sizes of at least 1 and sinks of at least 0, got {size}, {sinks}")

    def retention(self, layer: int, head: int) -> Retention:
        """One window for all heads, or the head's own."""
        del layer
        if len(self.sizes) == 1:
            return Retention(self.sizes[0], self.sinks)
        if head >= len(self.sizes):
            raise ConfigurationError(f"the window has sizes for {len(self.sizes)} KV heads, the model has head {head}")
        return Retention(self.sizes[head], self.sinks)

    def keep(self, retention: Retention, seen_tokens: int, runs: tuple[Run, ...], block_tokens: int) -> KeepPlan | None:
        """All blocks in which the next query still sees a row."""
        if retention.window is None:
            return None
        first_seen = max(seen_tokens - retention.window + 1, 0)
        wanted = (*clip_runs(runs, 0, min(retention.sinks, first_seen)), *clip_runs(runs, first_seen, seen_tokens))
        staying = whole_blocks(runs, block_tokens, wanted)
        if staying == runs:
            return None
        # The last run is the one that reaches the present. A sequence cut to n tokens is exact if the next query's
        # window, n - window + 1 on, lies within it.
        reaches_back_to = staying[-1][0] if staying else 0
        return KeepPlan(staying, floor=reaches_back_to + retention.window - 1)

    def to_dict(self) -> dict[str, Any]:
        """Name, sizes and sinks."""
        return {"name": self.name, "sizes": list(self.sizes), "sinks": self.sinks}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Window:
        """The window that `to_dict` described."""
        sizes = [int(size) for size in data["sizes"]]
        return cls(sizes[0] if len(sizes) == 1 else sizes, int(data["sinks"]))
