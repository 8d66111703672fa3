"""Rounding of positions to whole blocks, for policies that would rather keep a few rows more than move any."""

from __future__ import annotations

from collections.abc import Iterator

from stratakv.plan import Run, clip_runs


def whole_blocks(runs: tuple[Run, ...], block_tokens: int, wanted: tuple[Run, ...]) -> tuple[Run, ...]:
    """`wanted` positions, rounded out to whole blocks of a table whose rows stand for `runs`."""
    staying: list[Run] = []
    for block in _blocks(runs, block_tokens):
        if any(clip_runs(wanted, first, first + count) for first, count in block):
            for run in block:
                if staying and sum(staying[-1]) == run[0]:
                    staying[-1] = (staying[-1][0], staying[-1][1] + run[1])
                else:
                    staying.append(run)
    return tuple(staying)


def _blocks(runs: tuple[Run, ...], block_tokens: int) -> Iterator[list[Run]]:
    """The runs in each block, in order."""
    block: list[Run] = []
    room = block_tokens
    for first, count in runs:
        done = 0
        while done < count:
            take = min(count - done, room)
            block.append((first + done, take))
            done += take
            room -= take
            if not room:
                yield block
                block, room = [], block_tokens
    if block:
        yield block
