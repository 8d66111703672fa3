"""The books of a memory: every block is free, held or cached, every count is the number of its holders."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields

from stratakv.blocks.arena import Arena
from stratakv.blocks.pool import BlockPool, PoolUsage
from stratakv.blocks.sequence import Sequence
from stratakv.errors import InvariantError


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """Bytes and blocks over all groups. `used_bytes` are rows that hold a token of a live sequence or checkpoint."""

    held_bytes: int
    used_bytes: int
    bytes_copied_by_growth: int
    blocks: PoolUsage

    @property
    def waste(self) -> float:
        """Share of the bytes held that stores no token."""
        return 1 - self.used_bytes / self.held_bytes if self.held_bytes else 0.0


def audit(arenas: Seq[Arena], pools: Seq[BlockPool], live: Seq[Sequence], cached: Seq[Sequence]) -> MemoryUsage:
    """Verify every count, id and length there is.

    Args:
        arenas: of each group.
        pools: of each group.
        live: all sequences that can grow.
        cached: all sequences that a checkpoint holds.

    Raises:
        InvariantError: something does not add up.
    """
    usages = []
    used = 0
    for g, (pool, arena) in enumerate(zip(pools, arenas, strict=True)):
        usages.append(pool.check([s.tables[g].block_ids for s in live], [s.tables[g].block_ids for s in cached]))
        if pool.n_total != arena.n_blocks:
            raise InvariantError(f"group {g} has {pool.n_total} ids but memory for {arena.n_blocks} blocks")
        for slab in arena.slabs:
            shapes = [tuple(member.shape) for member in slab.members]
            if shapes != [(slab.n_blocks, member.nbytes) for member in arena.spec.members]:
                raise InvariantError(f"slab {slab.first} of group {g} has bytes of {shapes}")
        span = arena.spec.block_tokens
        filled: dict[int, int] = {}
        for sequence in (*live, *cached):
            table = sequence.tables[g]
            if len(table.block_ids) != arena.spec.blocks_for(table.n_rows):
                raise InvariantError(f"{len(table.block_ids)} blocks of {span} rows hold {table.n_rows} rows")
            if any(a + n > b for (a, n), (b, _) in zip(table.runs, table.runs[1:], strict=False)):
                raise InvariantError(f"positions do not rise: {table.runs}")
            for i, block in enumerate(table.block_ids):
                filled[block] = max(filled.get(block, 0), min(span, table.n_rows - i * span))
        used += sum(filled.values()) * arena.spec.bytes_per_block // span
    held = sum(arena.nbytes for arena in arenas)
    return MemoryUsage(held, used, sum(arena.bytes_copied for arena in arenas), _summed(usages))


def _summed(usages: Seq[PoolUsage]) -> PoolUsage:
    names = [field.name for field in fields(PoolUsage)]
    return PoolUsage(**{name: sum(getattr(usage, name) for usage in usages) for name in names})
