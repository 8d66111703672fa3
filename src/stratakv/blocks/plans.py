"""What a step writes and reads in each group, made once and shared by the group's layers."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from stratakv.blocks.memory import Memory
from stratakv.blocks.sequence import Sequence
from stratakv.plan import BlockTable, ReadPlan, WritePlan, clip_runs, run_length


@dataclass(slots=True)
class Step:
    """A forward under way: `n_tokens` new rows in every group, written by the layers in `written` so far."""

    n_tokens: int
    writes: dict[int, WritePlan] = field(default_factory=dict)
    reads: dict[int, ReadPlan] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)


class Plans:
    """Makes the plans of one batch's steps. A plan that blocks have moved under is made anew."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._tables: dict[int, tuple[int, list[list[int]], BlockTable]] = {}  # by group: version, block ids, table

    def write(self, sequences: Seq[Sequence], step: Step, group: int) -> WritePlan:
        """Where the new rows of a group go."""
        arena = self._memory.arenas[group]
        plan = step.writes.get(group)
        if plan is None or plan.version != arena.version:
            row = sequences[0].tables[group].n_rows - step.n_tokens
            first = row // arena.spec.block_tokens
            tables = tuple(
                tuple(arena.locate(block) for block in sequence.tables[group].block_ids[first:])
                for sequence in sequences
            )
            plan = WritePlan(step.n_tokens, row, arena.spec.block_tokens, tables, arena.version)
            step.writes[group] = plan
        return plan

    def read(self, sequences: Seq[Sequence], step: Step | None, group: int, seen_tokens: int) -> ReadPlan:
        """The rows of a group's first `seen_tokens` tokens that a query of `step` (all, without one) may see."""
        arena = self._memory.arenas[group]
        plan = step.reads.get(group) if step else None
        if plan is not None and plan.version == arena.version:
            return plan
        retention = arena.spec.retention
        stored = sequences[0].tables[group].runs if sequences else ()
        runs = clip_runs(stored, 0, seen_tokens)
        n_stored = n_rows = run_length(runs)
        if retention.window is not None and not retention.sinks:
            n_rows = min(n_rows, retention.window - 1 + (step.n_tokens if step else 0))
        skip = n_stored - n_rows
        blocks = self._block_table(sequences, group, arena.spec.blocks_for(n_stored))
        plan = ReadPlan(blocks, n_rows, skip, arena.spec.block_tokens, _without_first(runs, skip), arena.version)
        if step is not None:
            step.reads[group] = plan
        return plan

    def _block_table(self, sequences: Seq[Sequence], group: int, n_blocks: int) -> BlockTable:
        """The first `n_blocks` blocks of each sequence: the table of the step before, where it is still right."""
        arena = self._memory.arenas[group]
        ids = [sequence.tables[group].block_ids[:n_blocks] for sequence in sequences]
        last = self._tables.get(group)
        if last is not None and last[0] == arena.version and last[1] == ids:
            return last[2]
        segments = (segment for b, row in enumerate(ids) for segment in arena.segments(b, row))
        table = BlockTable(len(ids), tuple(segments))
        self._tables[group] = (arena.version, ids, table)
        return table


def _without_first(runs: tuple[tuple[int, int], ...], skip: int) -> tuple[tuple[int, int], ...]:
    left = []
    for first, count in runs:
        drop = min(skip, count)
        skip -= drop
        if count > drop:
            left.append((first + drop, count - drop))
    return tuple(left)
