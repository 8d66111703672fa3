"""Tables of the angles by which rotary embeddings turn, taken from the model's own module."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from stratakv.errors import UnsupportedError

FIRST_POSITIONS = 4096


class Rotations:
    """Cosines and sines of each kind of layer, by position; they grow as positions are reached.

    Args:
        module: the model's rotary embedding, which is copied.
        layer_types: of each layer. Models with one rotation for all give one table.
        head_dim: of queries and keys.

    Raises:
        UnsupportedError: not all of a head is turned, or not in halves.
    """

    def __init__(self, module: Any, layer_types: tuple[str, ...], head_dim: int) -> None:
        self._module = copy.deepcopy(module).to("cpu")
        self._head_dim = head_dim
        self._by_type = isinstance(module.rope_type, dict)
        self.kinds = tuple(sorted(set(layer_types))) if self._by_type else ("",)
        self.of_layer = tuple(self.kinds.index(kind) if self._by_type else 0 for kind in layer_types)
        self.tables: list[tuple[Tensor, Tensor]] = []
        self.n_positions = 0
        self.reach(1)

    def reach(self, n_positions: int) -> list[tuple[Tensor, Tensor]]:
        """The tables, of at least `n_positions` each: another list only where they had to be made anew."""
        if n_positions > self.n_positions:
            reached = max(n_positions, 2 * self.n_positions, FIRST_POSITIONS)
            self.tables = [self._table(kind, reached) for kind in self.kinds]
            self.n_positions = reached  # last: nobody may read a table that was not made
        return self.tables

    def _table(self, kind: str, n_positions: int) -> tuple[Tensor, Tensor]:
        """fp32 `[n_positions, pairs]` each: the second half of what the module gives repeats the first."""
        positions = torch.arange(n_positions, device="cpu").unsqueeze(0)
        like = torch.empty(0, dtype=torch.float32, device="cpu")  # what the angles should be
        found = self._module(like, positions, kind) if self._by_type else self._module(like, positions)
        halves = [table[0].chunk(2, dim=-1) for table in found]
        if found[0].shape[-1] != self._head_dim or not all(torch.equal(*each) for each in halves):
            raise UnsupportedError(
                f"the native runner turns whole heads, of {self._head_dim}, by halves; this rotation is "
                f"{found[0].shape[-1]} wide"
            )
        (cosines, _), (sines, _) = halves
        return cosines.contiguous(), sines.contiguous()
