"""A state of a `KVCache` to come back to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stratakv.blocks.checkpoint import Checkpoint
from stratakv.blocks.interrupts import uninterrupted
from stratakv.integrations.transformers import recurrent


class CacheCheckpoint:
    """A state of a `KVCache`. Holds blocks until it is released or garbage collected."""

    def __init__(self, rows: Checkpoint, layers: Sequence[Any], token_ids: tuple[tuple[int, ...], ...] | None) -> None:
        self.rows = rows
        self.states = {i: recurrent.states_of(layer) for i, layer in enumerate(layers) if recurrent.has_states(layer)}
        self.token_ids = token_ids

    @property
    def seen_tokens(self) -> int:
        """Tokens that the cache had seen."""
        return self.rows.seen_tokens

    @uninterrupted
    def release(self) -> None:
        """Let go of the blocks."""
        self.rows.release()
