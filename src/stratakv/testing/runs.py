"""Runs of positions, spelt out and back."""

from __future__ import annotations

from collections.abc import Iterable

from stratakv.plan import Run


def positions(runs: Iterable[Run]) -> list[int]:
    """Every position in `runs`, in their order."""
    return [position for first, count in runs for position in range(first, first + count)]


def runs_of(found: Iterable[int]) -> tuple[Run, ...]:
    """The fewest runs that hold the positions `found`, in rising order."""
    runs: list[Run] = []
    for position in sorted(found):
        if runs and sum(runs[-1]) == position:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((position, 1))
    return tuple(runs)
