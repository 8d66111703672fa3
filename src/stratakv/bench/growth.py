"""Bytes that a layout copies while a sequence grows. A matter of memory alone: no model is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from stratakv.integrations.transformers import KVCache

STEP_TOKENS = 16  # appended at once, so that every layout meets all of its own growth steps


@dataclass(frozen=True)
class Growth:
    """A cache that was grown to `length` tokens, in steps."""

    length: int
    bytes_copied: int  # by growth, so far
    row_bytes: int  # keys and values of `length` tokens
    held_bytes: int
    waste: float

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON report."""
        return asdict(self)


def measure_growth(
    model: Any, layout: str, lengths: Sequence[int], *, format: str | None = None, block_tokens: int = 64
) -> list[Growth]:
    """Grow one cache through `lengths`, which rise, and read its books at each."""
    capacity = lengths[-1] if layout == "contiguous" else None
    cache = KVCache.for_model(model, format=format, layout=layout, block_tokens=block_tokens, capacity=capacity)
    rows = {
        layer.index: (
            torch.ones(1, layer.n_kv_heads, STEP_TOKENS, layer.k_dim, dtype=model.dtype),
            torch.ones(1, layer.n_kv_heads, STEP_TOKENS, layer.v_dim, dtype=model.dtype),
        )
        for layer in cache.spec.layers
    }
    found = []
    for length in lengths:
        while cache.seen_tokens < length:
            n = min(STEP_TOKENS, length - cache.seen_tokens)
            cache.batch.begin(1, n)
            for index, (keys, values) in rows.items():
                cache.batch.write(index, keys[:, :, :n], values[:, :, :n])
        usage = cache.check()
        row_bytes = round(usage.used_bytes)
        found.append(Growth(length, usage.bytes_copied_by_growth, row_bytes, usage.held_bytes, usage.waste))
    return found
