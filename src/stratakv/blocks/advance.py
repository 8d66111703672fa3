"""What a step takes in blocks, seen before anything changes: those its rows need, less those that leave the windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from stratakv.blocks.compaction import Compaction, plan_compaction
from stratakv.blocks.geometry import rows_coded_together
from stratakv.blocks.sequence import GroupTable, Growth, Ledger, Sequence
from stratakv.plan import KeepPlan
from stratakv.spec import GroupSpec

Change = tuple[Sequence, int, KeepPlan]
"""In one group of a sequence, what is kept."""

_COMING = -1  # stands for a block that is not chosen yet, which nobody else holds


@dataclass(frozen=True, slots=True)
class Advance:
    """First compactions, then growth of the tables that they leave."""

    compactions: list[tuple[Sequence, int, KeepPlan, Compaction]]
    growths: list[tuple[Sequence, int, Growth]]
    n_free: list[int]
    """Blocks of each group that have to be free before: rows move into new blocks before the old ones are let go."""


def plan_advance(
    ledger: Ledger, groups: Seq[GroupSpec], sequences: Seq[Sequence], n_tokens: int, changes: Seq[Change]
) -> Advance:
    """Plan `changes`, and `n_tokens` more rows for each of `sequences` after them, in blocks as `groups` describe them.

    Raises:
        ConfigurationError: a change names positions that are not stored.
        UnsupportedError: rows that are coded together would part.
    """
    compactions, growths, n_free = [], [], []
    for g, (group, pool) in enumerate(zip(groups, ledger.pools, strict=True)):
        leaving = Counter[int]()  # holders that a block is about to lose
        tables: dict[int, GroupTable] = {}
        n_moved = 0
        for sequence, own_group, plan in changes:
            if own_group != g:
                continue
            table = sequence.tables[g]
            change = plan_compaction(table.block_ids, table.runs, group.block_tokens, plan, rows_coded_together(group))
            compactions.append((sequence, g, plan, change))
            tables[id(sequence)] = GroupTable([*change.kept, *[_COMING] * change.n_new], plan.runs)
            leaving.update(change.dropped)
            n_moved += change.n_new
        n_freed = sum(pool.references(block) == times for block, times in leaving.items())
        n_grown = 0
        for sequence in sequences:
            table = tables.get(id(sequence), sequence.tables[g])
            last = table.block_ids[-1] if table.n_rows % group.block_tokens else _COMING
            is_shared = last != _COMING and pool.references(last) - leaving[last] > 1
            if is_shared:
                leaving[last] += (
                    1  # from here on of growth, too: of sequences that share a last block, the last keeps it
                )
            n_blocks = group.blocks_for(table.n_rows + n_tokens) - len(table.block_ids) + is_shared
            growths.append((sequence, g, Growth(n_blocks, last if is_shared else None)))
            n_grown += n_blocks
        n_free.append(max(n_moved, n_moved + n_grown - n_freed))
    return Advance(compactions, growths, n_free)
