"""How memory that is not needed goes back: free last slabs, and blocks that move so that slabs become free."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from stratakv.blocks.arena import Arena
from stratakv.blocks.pool import BlockPool
from stratakv.blocks.sequence import GroupTable


def give_back(pool: BlockPool, arena: Arena) -> None:
    """Give back free last slabs, as long as enough of the rest is free too: a decode must not thrash."""
    while arena.slabs and arena.slabs[-1].first > pool.highest_held():
        left = arena.slabs[-1].first
        if left and pool.n_free - arena.slabs[-1].n_blocks < _spare(arena, left):
            break
        pool.shrink(arena.shrink(left))


def consolidate(pool: BlockPool, arena: Arena, tables: Seq[GroupTable]) -> None:
    """Move the blocks held in last slabs to free places before them, where that frees slabs to give back.

    Done between steps only. Plans that other caches over this memory hold from their last step become void.

    Args:
        pool: the ids.
        arena: the bytes.
        tables: those of all holders there are.
    """
    n_free = pool.n_free
    moving: list[int] = []
    for slab in reversed(arena.slabs):
        n_free -= slab.n_blocks
        if not slab.first or n_free < _spare(arena, slab.first):
            break
        moving.extend(b for b in range(slab.first, slab.first + slab.n_blocks) if pool.references(b))
    if moving:
        blocks = sorted(moving)
        moved = dict(zip(blocks, pool.lowest_free(len(blocks)), strict=True))
        arena.relocate(moved.items())  # first what can fail
        pool.relocate(moved)
        for table in tables:
            table.block_ids[:] = [moved.get(block, block) for block in table.block_ids]


def _spare(arena: Arena, n_blocks: int) -> int:
    """Blocks that stay free. Recent rows take none but those that the oldest of them leave in the same step."""
    return max(1, n_blocks // 8) if arena.spec.recent_of is None else 0
