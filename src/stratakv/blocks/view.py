"""What a step's attention may read: the rows of one layer, old and new. Good for exactly one step."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from stratakv.blocks.arena import Arena
from stratakv.errors import UnsupportedError
from stratakv.plan import ReadPlan, Run, clip_runs, join_runs, run_length
from stratakv.spec import Retention


@dataclass(frozen=True, slots=True)
class KVPart:
    """The rows of some KV heads of a layer.

    `retention` is set where a policy limits what a query sees; the model's own window stands in the model's mask.
    `recent` has the rows of these heads that are read in 16 bits, which are none of `plan`'s: the last ones, and
    perhaps the first.
    """

    heads: tuple[int, ...]
    arena: Arena
    member: int
    plan: ReadPlan
    retention: Retention | None
    recent: KVPart | None = None

    @property
    def n_rows(self) -> int:
        """Rows, recent ones included."""
        return self.plan.n_rows + (self.recent.n_rows if self.recent else 0)

    @property
    def runs(self) -> tuple[Run, ...]:
        """The positions of the rows, recent ones included."""
        if self.recent is None:
            return self.plan.runs
        before, after = self._around()
        return join_runs((*before, *self.plan.runs, *after))

    def positions(self) -> Tensor:
        """int64 `[n_rows]`: the absolute position of each row."""
        runs = [torch.arange(first, first + n, device="cpu") for first, n in self.runs]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64, device="cpu")

    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K `[n_sequences, n_heads, n_rows, k_dim]` and V `[..., v_dim]` of these heads."""
        rows = self.arena.read(self.member, self.plan, dtype)
        if self.recent is None:
            return rows
        recent, n = self.recent.read(dtype), run_length(self._around()[0])
        keys, values = (torch.cat((r[:, :, :n], p, r[:, :, n:]), 2) for p, r in zip(rows, recent, strict=True))
        return keys, values

    def _around(self) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
        """The runs of the recent rows before this part's own, and of those after them."""
        assert self.recent is not None
        if not self.plan.runs:
            return (), self.recent.plan.runs
        start, stop = self.plan.runs[0][0], sum(self.plan.runs[-1])
        return clip_runs(self.recent.plan.runs, 0, start), clip_runs(self.recent.plan.runs, stop, sys.maxsize)


@dataclass(frozen=True, slots=True)
class KVView:
    """One layer's rows. The parts together hold every KV head once; their numbers of rows may differ.

    `n_new` rows are this step's: the queries are at positions `seen_tokens .. seen_tokens + n_new - 1`.
    """

    layer: int
    n_sequences: int
    n_kv_heads: int
    k_dim: int
    v_dim: int
    seen_tokens: int
    n_new: int
    parts: tuple[KVPart, ...]

    @property
    def n_rows(self) -> int:
        """Rows of the part that has most."""
        return max(part.n_rows for part in self.parts)

    def gather(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K `[n_sequences, n_kv_heads, n_rows, k_dim]` and V `[..., v_dim]` as plain tensors.

        Raises:
            UnsupportedError: the heads hold different numbers of rows.
        """
        if len(self.parts) == 1:
            return self.parts[0].read(dtype)
        if len({part.n_rows for part in self.parts}) > 1:
            rows = {part.heads: part.n_rows for part in self.parts}
            raise UnsupportedError(f"the heads of layer {self.layer} hold different numbers of rows ({rows})")
        order = torch.tensor([head for part in self.parts for head in part.heads], device="cpu").argsort()
        read = [part.read(dtype) for part in self.parts]
        keys, values = (torch.cat(tensors, dim=1)[:, order] for tensors in zip(*read, strict=True))
        return keys, values
