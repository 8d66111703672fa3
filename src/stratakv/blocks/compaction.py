"""Which blocks stay and which rows move when a sequence keeps only some of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stratakv.errors import ConfigurationError, UnsupportedError
from stratakv.plan import KeepPlan, Run, clip_runs, run_length


@dataclass(frozen=True, slots=True)
class Compaction:
    """The new table: first `kept` blocks as they are, then `n_new` fresh blocks that `rows` of the old table move into.

    `dropped` are the blocks that leave the table. `rows` are numbered in the old table.
    """

    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    rows: tuple[int, ...]
    n_new: int


def plan_compaction(
    block_ids: Sequence[int], runs: tuple[Run, ...], block_tokens: int, plan: KeepPlan, group_rows: int = 1
) -> Compaction:
    """Turn positions to keep into blocks and rows of a table with `block_ids`, whose rows stand for `runs`.

    A block of which every row goes leaves the table and nothing moves; one of which every row stays is kept as it is
    as long as the blocks before it are full. From the first block that loses only a part of its rows on, rows move.

    Raises:
        ConfigurationError: the plan names positions that are not stored.
        UnsupportedError: it parts `group_rows` rows that are coded together.
    """
    if run_length(plan.runs) != sum(run_length(clip_runs(runs, s, s + n)) for s, n in plan.runs):
        raise ConfigurationError(f"positions to keep {plan.runs} are not all among the stored ones {runs}")
    kept: list[int] = []
    dropped: list[int] = []
    rows: list[int] = []
    packing = False
    for at, positions in enumerate(_block_positions(runs, block_tokens)):
        staying = [r for r, position in enumerate(positions) if _contains(plan.runs, position)]
        packing = packing or 0 < len(staying) < len(positions)
        if packing:
            rows.extend(at * block_tokens + r for r in staying)
        if not packing and staying:
            kept.append(block_ids[at])
        else:
            dropped.append(block_ids[at])
    if group_rows > 1 and rows and not _are_whole_groups(rows, block_tokens, group_rows, run_length(runs)):
        raise UnsupportedError(
            f"{group_rows} rows are coded together and stay or go together; the positions to keep are {plan.runs}"
        )
    return Compaction(tuple(kept), tuple(dropped), tuple(rows), -(-len(rows) // block_tokens))


def _are_whole_groups(rows: Sequence[int], block_tokens: int, size: int, n_rows: int) -> bool:
    """Whether `rows` of `n_rows` are whole groups that stay whole when they follow one another from a block's start."""
    if block_tokens % size:  # a block's last group is a smaller one, which would come to lie where others do
        return False
    staying = set(rows)
    return all(
        set(range(first, min(first + size, n_rows))) <= staying for first in {row // size * size for row in rows}
    )


def _block_positions(runs: tuple[Run, ...], block_tokens: int) -> Iterator[list[int]]:
    positions = [position for first, count in runs for position in range(first, first + count)]
    for start in range(0, len(positions), block_tokens):
        yield positions[start : start + block_tokens]


def _contains(runs: tuple[Run, ...], position: int) -> bool:
    return any(first <= position < first + count for first, count in runs)
