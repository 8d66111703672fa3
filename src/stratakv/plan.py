"""Plain frozen data that travels between the parts: what to keep, what to write, what to read.

A plan is made from ids (block tables) once a step and group, and used by every layer of the group. Plans that name
places in memory carry the arena's `version`: blocks that moved since make them void, and the arena refuses them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from stratakv.errors import ConfigurationError
from stratakv.units import whole

Run = tuple[int, int]
"""(first absolute position, number of consecutive positions)."""


def run_length(runs: tuple[Run, ...] | list[Run]) -> int:
    """Number of positions in `runs`."""
    return sum(count for _, count in runs)


def join_runs(runs: Iterable[Run]) -> tuple[Run, ...]:
    """The same positions, rising, in as few runs as there can be."""
    joined: list[Run] = []
    for first, count in runs:
        if joined and sum(joined[-1]) == first:
            joined[-1] = (joined[-1][0], joined[-1][1] + count)
        else:
            joined.append((first, count))
    return tuple(joined)


def clip_runs(runs: tuple[Run, ...] | list[Run], start: int, stop: int) -> tuple[Run, ...]:
    """The part of `runs` whose positions are in [start, stop)."""
    clipped = ((max(first, start), min(first + count, stop)) for first, count in runs)
    return tuple((first, last - first) for first, last in clipped if first < last)


def without_first(runs: Iterable[Run], skip: int) -> tuple[Run, ...]:
    """The positions of `runs` but for the first `skip`."""
    left = []
    for first, count in runs:
        drop = min(skip, count)
        skip -= drop
        if count > drop:
            left.append((first + drop, count - drop))
    return tuple(left)


@dataclass(frozen=True, slots=True)
class KeepPlan:
    """Which positions stay, in rising order, and how far back a truncation is still exact afterwards.

    `floor`: a sequence cut to at least this many tokens is what it would have been without the later ones.
    """

    runs: tuple[Run, ...]
    floor: int

    def __post_init__(self) -> None:
        if any(len(run) != 2 for run in self.runs):
            raise ConfigurationError(f"runs must be (position, count), got {self.runs}")
        runs = tuple((whole("a position", first), whole("positions", count)) for first, count in self.runs)
        object.__setattr__(self, "runs", runs)
        object.__setattr__(self, "floor", whole("the floor", self.floor))
        ends = [0, *(first + count for first, count in runs)]
        if any(first < end or count < 1 for (first, count), end in zip(runs, ends, strict=False)):
            raise ConfigurationError(f"runs must be (position, count) that rise without overlap, got {runs}")


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive blocks of one sequence that lie in one slab.

    Blocks `[first, first + count)` of slab `slab` are blocks `[at, at + count)` of the table of `sequence`.
    """

    sequence: int
    slab: int
    first: int
    count: int
    at: int


@dataclass(frozen=True)
class BlockTable:
    """The blocks of each sequence, in order. Steps that need no new block share one."""

    n_sequences: int
    segments: tuple[Segment, ...]
    positions: list[tuple[tuple[object, ...], Tensor]] = field(default_factory=list, compare=False, repr=False)
    """The positions of the blocks' rows as the last plan had them, and what they depend on; or nothing."""

    @cached_property
    def n_blocks(self) -> int:
        """Blocks of each sequence."""
        return sum(segment.count for segment in self.segments) // max(self.n_sequences, 1)

    @cached_property
    def tensor(self) -> Tensor:
        """int32 `[n_sequences, n_blocks, 2]`: (slab, block in the slab) of each block, for kernels."""
        table = torch.empty((self.n_sequences, self.n_blocks, 2), dtype=torch.int32, device="cpu")
        for s in self.segments:
            table[s.sequence, s.at : s.at + s.count, 0] = s.slab
            table[s.sequence, s.at : s.at + s.count, 1] = torch.arange(
                s.first, s.first + s.count, dtype=torch.int32, device="cpu"
            )
        return table


@dataclass(frozen=True)
class ReadPlan:
    """The rows of all sequences in one group. All sequences hold equally many rows, at the same positions.

    The first `skip` of the rows in the blocks are not for reading (they have left the window).
    """

    blocks: BlockTable
    n_rows: int
    skip: int
    block_tokens: int
    runs: tuple[Run, ...]
    version: int

    @property
    def n_sequences(self) -> int:
        """Sequences."""
        return self.blocks.n_sequences

    @property
    def n_blocks(self) -> int:
        """Blocks of each sequence."""
        return self.blocks.n_blocks

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The blocks, as stretches."""
        return self.blocks.segments

    @property
    def table(self) -> Tensor:
        """The blocks, as kernels read them."""
        return self.blocks.tensor

    @cached_property
    def row_positions(self) -> Tensor:
        """int32 `[skip + n_rows]`: the absolute position of each row, at least one; of what is skipped 0."""
        *before, last = self.runs
        known, fact = self.blocks.positions, (self.skip, tuple(before), last[0])
        if not known or known[0][0] != fact:
            n_left = self.n_blocks * self.block_tokens - self.skip - run_length(before)
            runs = [*before, (last[0], n_left)]  # steps to come in these blocks want the same
            each = [torch.arange(first, first + count, dtype=torch.int32, device="cpu") for first, count in runs]
            known[:] = [(fact, torch.cat([torch.zeros(self.skip, dtype=torch.int32, device="cpu"), *each]))]
        return known[0][1][: self.skip + self.n_rows]

    @cached_property
    def is_one_run(self) -> bool:
        """Whether the rows' positions are consecutive."""
        return len(self.runs) <= 1


@dataclass(frozen=True)
class Places:
    """The new rows that go into one slab.

    `chosen`, int64 `[n]`, are the ones of all sequences' new rows, None: all of them. Each goes into row `row[i]` of
    block `block[i]` of the slab.
    """

    slab: int
    chosen: Tensor | None
    block: Tensor
    row: Tensor


@dataclass(frozen=True)
class WritePlan:
    """Where `n_tokens` new rows of each sequence go: row `row` of its table on.

    `tables[b]` lists the (slab, block in the slab) pairs of the blocks that receive rows, in order.
    """

    n_tokens: int
    row: int
    block_tokens: int
    tables: tuple[tuple[tuple[int, int], ...], ...]
    version: int

    @cached_property
    def table(self) -> array[int]:
        """int32 `[n_sequences, n_blocks, 2]`: `tables`, for kernels."""
        return array("i", (number for blocks in self.tables for place in blocks for number in place))

    @cached_property
    def places(self) -> tuple[Places, ...]:
        """Where each row goes, slab by slab; the rows of a sequence follow one another."""
        rows = torch.arange(self.row, self.row + self.n_tokens, device="cpu")
        at, row = rows // self.block_tokens - self.row // self.block_tokens, rows % self.block_tokens
        tables = torch.tensor(self.tables, device="cpu")  # [n_sequences, n_blocks, 2]
        slab, block = tables[:, at, 0].flatten(), tables[:, at, 1].flatten()
        row = row.repeat(len(self.tables))
        slabs = slab.unique().tolist()
        if len(slabs) == 1:
            return (Places(slabs[0], None, block, row),)
        chosen = [torch.nonzero(slab == s).flatten() for s in slabs]
        return tuple(Places(s, c, block[c], row[c]) for s, c in zip(slabs, chosen, strict=True))
