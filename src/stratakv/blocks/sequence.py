"""One logical sequence: for each group, which blocks hold its tokens and which positions their rows stand for."""

from __future__ import annotations

from dataclasses import dataclass, field

from stratakv.blocks.compaction import Compaction
from stratakv.blocks.pool import BlockPool
from stratakv.errors import StateError
from stratakv.plan import KeepPlan, Run, clip_runs, run_length
from stratakv.spec import GroupSpec


@dataclass(slots=True)
class Ledger:
    """What all sequences over the same memory share: the groups, and the pool of ids of each."""

    groups: tuple[GroupSpec, ...]
    pools: tuple[BlockPool, ...]


@dataclass(slots=True)
class GroupTable:
    """The blocks of one sequence in one group, in order, and the absolute positions of the rows in them.

    Row `r` lies in block `block_ids[r // block_tokens]`. `floor` is the smallest length to which a truncation leaves
    what a fresh run of that length would have left: rows that are gone may have been wanted below it.
    """

    block_ids: list[int] = field(default_factory=list)
    runs: tuple[Run, ...] = ()
    floor: int = 0

    @property
    def n_rows(self) -> int:
        """Rows stored."""
        return run_length(self.runs)

    def copy(self) -> GroupTable:
        """The same blocks and positions in a table of its own."""
        return GroupTable(list(self.block_ids), self.runs, self.floor)


@dataclass(frozen=True, slots=True)
class Growth:
    """What appending to one table takes: `n_blocks` blocks, the first of which replaces a shared last one."""

    n_blocks: int
    replaces: int | None


class Sequence:
    """Positions and block tables of one sequence.

    `seen_tokens` counts positions: every token that was ever appended and not truncated. The rows that are stored for
    them can be fewer, and differ between groups: `stored_tokens`.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.seen_tokens = 0
        self.tables = tuple(GroupTable() for _ in ledger.groups)

    @property
    def stored_tokens(self) -> int:
        """Rows stored in the group that stores most."""
        return max((table.n_rows for table in self.tables), default=0)

    def append(self, group: int, n_tokens: int, growth: Growth, blocks: list[int]) -> None:
        """Add `n_tokens` positions to `group`, with `blocks` as the blocks that `growth` asked for.

        `seen_tokens` is the caller's to advance, once all groups have grown.
        """
        table = self.tables[group]
        if growth.replaces is not None:
            table.block_ids[-1] = blocks[0]
            self.ledger.pools[group].release([growth.replaces])
            blocks = blocks[1:]
        table.block_ids.extend(blocks)
        table.runs = _extended(table.runs, self.seen_tokens, n_tokens)

    def fork(self) -> Sequence:
        """A sequence that shares all blocks with this one; either copies a block before it writes into it."""
        twin = Sequence(self.ledger)
        twin.seen_tokens = self.seen_tokens
        twin.tables = tuple(table.copy() for table in self.tables)
        for pool, table in zip(self.ledger.pools, self.tables, strict=True):
            pool.retain(table.block_ids)
        return twin

    def can_truncate(self, n_tokens: int) -> str | None:
        """Why the sequence cannot be cut to its first `n_tokens` exactly, or None where it can."""
        if not 0 <= n_tokens <= self.seen_tokens:
            return f"the cache has seen {self.seen_tokens} tokens and cannot be cut to {n_tokens}"
        for spec, table in zip(self.ledger.groups, self.tables, strict=True):
            is_copy = spec.recent_of is not None  # what it lacks is in the other group
            if n_tokens < self.seen_tokens and n_tokens and n_tokens < table.floor and not is_copy:
                return (
                    f"rows that a run of {n_tokens} tokens would still see have left the window of group "
                    f"{spec.name!r}; the shortest exact length is {table.floor}"
                )
        return None

    def truncate(self, n_tokens: int) -> list[list[int]]:
        """Keep the first `n_tokens` tokens; returns the blocks that became free, a list a group.

        Raises:
            StateError: that cannot be done exactly; nothing was changed.
        """
        if reason := self.can_truncate(n_tokens):
            raise StateError(reason)
        freed = []
        for spec, pool, table in zip(self.ledger.groups, self.ledger.pools, self.tables, strict=True):
            table.runs = clip_runs(table.runs, 0, n_tokens)
            n_blocks = spec.blocks_for(table.n_rows)
            freed.append(pool.release(table.block_ids[n_blocks:]))
            del table.block_ids[n_blocks:]
            if not n_tokens:
                table.floor = 0
        self.seen_tokens = n_tokens
        return freed

    def compact(self, group: int, plan: KeepPlan, change: Compaction, new_blocks: list[int]) -> list[int]:
        """Take on the table that `change` describes, the rows having been moved; returns blocks that became free."""
        table = self.tables[group]
        table.block_ids[:] = [*change.kept, *new_blocks]
        table.runs = plan.runs
        table.floor = max(table.floor, plan.floor)
        return self.ledger.pools[group].release(change.dropped)

    def adopt(self, group: int, table: GroupTable) -> None:
        """Take on rows that were loaded: blocks that are held already, and their positions."""
        mine = self.tables[group]
        mine.block_ids[:] = table.block_ids
        mine.runs, mine.floor = table.runs, table.floor

    def release(self) -> list[list[int]]:
        """Let go of all blocks; returns those that became free, a list a group."""
        return self.truncate(0)


def _extended(runs: tuple[Run, ...], start: int, count: int) -> tuple[Run, ...]:
    if runs and sum(runs[-1]) == start:
        first, length = runs[-1]
        return (*runs[:-1], (first, length + count))
    return (*runs, (start, count))
