"""What a step writes and reads in each group, made once and shared by the group's layers."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

from stratakv.blocks.geometry import rows_coded_together
from stratakv.blocks.memory import Memory
from stratakv.blocks.sequence import Sequence
from stratakv.plan import BlockTable, ReadPlan, WritePlan, clip_runs, run_length, without_first


@dataclass(slots=True)
class Step:
    """A forward under way: `n_tokens` new rows in every group, written by the layers in `written` so far."""

    n_tokens: int
    writes: dict[int, WritePlan] = field(default_factory=dict)
    group_writes: dict[int, WritePlan | None] = field(default_factory=dict)
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

    def write_groups(self, sequences: Seq[Sequence], step: Step, group: int) -> WritePlan | None:
        """Where the rows go that are coded together and are complete with the new ones, which are the last of them.

        Where no other group holds the rows meanwhile, these are all there will be.
        """
        arena, plan = self._memory.arenas[group], self.write(sequences, step, group)
        found = step.group_writes.get(group)
        if group not in step.group_writes or (found is not None and found.version != arena.version):
            span, size = plan.block_tokens, rows_coded_together(arena.spec)
            start, stop = plan.row - plan.row % span % size, plan.row + plan.n_tokens
            if group in self._memory.spec.recents:
                stop -= stop % span % size
            found = replace(plan, n_tokens=stop - start, row=start) if stop > start else None
            step.group_writes[group] = found
        return found

    def read(self, sequences: Seq[Sequence], step: Step | None, group: int, seen_tokens: int) -> ReadPlan:
        """The rows of a group's first `seen_tokens` tokens that a query of `step` (all, without one) may see.

        Those that are held in 16 bits as well are left out.
        """
        arena = self._memory.arenas[group]
        plan = step.reads.get(group) if step else None
        if plan is not None and plan.version == arena.version:
            return plan
        start, stop = self._not_recent(sequences, group, seen_tokens)
        of = arena.spec.recent_of
        retention = (arena.spec if of is None else self._memory.spec.groups[of]).retention
        if retention.window is not None and not retention.sinks:
            start = max(start, seen_tokens - (retention.window - 1 + (step.n_tokens if step else 0)))
        plan = self.read_span(sequences, group, start, stop)
        if step is not None:
            step.reads[group] = plan
        return plan

    def read_span(self, sequences: Seq[Sequence], group: int, start: int, stop: int) -> ReadPlan:
        """All rows of a group at positions `[start, stop)`."""
        spec, version = self._memory.arenas[group].spec, self._memory.arenas[group].version
        stored = sequences[0].tables[group].runs if sequences else ()
        runs = clip_runs(stored, start, stop)
        n_rows = run_length(runs)
        skip = run_length(clip_runs(stored, 0, start)) if n_rows else 0
        blocks = self._block_table(sequences, group, spec.blocks_for(skip + n_rows))
        return ReadPlan(blocks, n_rows, skip, spec.block_tokens, runs, version)

    def _not_recent(self, sequences: Seq[Sequence], group: int, seen_tokens: int) -> tuple[int, int]:
        """Where the rows of a group stand that no other group holds in 16 bits: between the first and the last."""
        recent = self._memory.spec.recents.get(group)
        if recent is None or not sequences:
            return 0, seen_tokens
        held = clip_runs(sequences[0].tables[recent].runs, 0, seen_tokens)
        first = clip_runs(held, 0, self._memory.spec.groups[recent].retention.sinks)
        last = without_first(held, run_length(first))
        return sum(first[-1]) if first else 0, last[0][0] if last else seen_tokens

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
