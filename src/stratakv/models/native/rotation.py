"""Tables of the angles by which rotary embeddings turn, taken from the model's own module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FIRST_POSITIONS = 4096


class Rotations:
    """Cosines and sines of each kind of layer, by position; they grow as positions are reached.

    Args:
        module: the model's rotary embedding.
        layer_types: of each layer. Models with one rotation for all give one table.
    """

    def __init__(self, module: Any, layer_types: tuple[str, ...]) -> None:
        self._module = module
        self._by_type = isinstance(module.rope_type, dict)
        self.kinds = tuple(sorted(set(layer_types))) if self._by_type else ("",)
        self.of_layer = tuple(self.kinds.index(kind) if self._by_type else 0 for kind in layer_types)
        self.tables: list[tuple[Tensor, Tensor]] = []
        self.n_positions = 0

    def reach(self, n_positions: int) -> list[tuple[Tensor, Tensor]]:
        """The tables, of at least `n_positions` each: another list only where they had to be made anew."""
        if n_positions > self.n_positions:
            self.n_positions = max(n_positions, 2 * self.n_positions, FIRST_POSITIONS)
            self.tables = [self._table(kind) for kind in self.kinds]
        return self.tables

    def _table(self, kind: str) -> tuple[Tensor, Tensor]:
        """fp32 `[n_positions, pairs]` each: the second half of what the module gives repeats the first."""
        positions = torch.arange(self.n_positions, device="cpu").unsqueeze(0)
        numbers = torch.empty(
            0, dtype=torch.float32, device="cpu"
        )  # of the dtype and on the device that the angles should have
        found = self._module(numbers, positions, kind) if self._by_type else self._module(numbers, positions)
        cosines, sines = (table[0, :, : table.shape[-1] // 2].contiguous() for table in found)
        return cosines, sines
