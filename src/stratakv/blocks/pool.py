"""Block ids: which are free, and how many holders each of the others has. No bytes here."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stratakv.errors import CapacityError, InvariantError


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """Blocks by state. `held`: in the table of a live sequence. `cached`: kept by checkpoints alone."""

    free: int
    held: int
    cached: int
    total: int


class BlockPool:
    """Ids `0 .. n_total-1` with reference counts.

    The lowest free ids go out first: tables then tend to be runs of consecutive blocks, which read faster, and the
    highest ids tend to be free, so that `shrink` can give whole slabs back.
    """

    def __init__(self) -> None:
        self._references: list[int] = []
        self._free: list[int] = []  # a heap

    @property
    def n_total(self) -> int:
        """Blocks that exist."""
        return len(self._references)

    @property
    def n_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def grow(self, n_blocks: int) -> None:
        """Add `n_blocks` new free blocks behind the present ones."""
        first = self.n_total
        self._references.extend([0] * n_blocks)
        for block in range(first, first + n_blocks):
            heapq.heappush(self._free, block)

    def shrink(self, n_total: int) -> None:
        """Forget the blocks from `n_total` on, all of which must be free.

        Raises:
            InvariantError: one of them is held; nothing was changed.
        """
        if any(self._references[n_total:]):
            raise InvariantError(f"blocks from {n_total} on cannot be removed: some are held")
        self._free = [block for block in self._free if block < n_total]
        heapq.heapify(self._free)
        del self._references[n_total:]

    def highest_held(self) -> int:
        """The highest id that somebody holds, or -1 where all are free."""
        return next((block for block in range(self.n_total - 1, -1, -1) if self._references[block]), -1)

    def alloc(self, n_blocks: int) -> list[int]:
        """Hand out `n_blocks` free blocks, each with one reference, in rising order.

        Raises:
            CapacityError: fewer are free; nothing was changed.
        """
        if n_blocks > self.n_free:
            raise CapacityError(f"{n_blocks} blocks wanted, {self.n_free} of {self.n_total} are free")
        blocks = [heapq.heappop(self._free) for _ in range(n_blocks)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """Add a holder to each of `blocks`, which must be held already."""
        blocks = list(blocks)
        if not all(self._is_held(block) for block in blocks):
            raise InvariantError(f"only held blocks can be retained, got {blocks}")
        for block in blocks:
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> list[int]:
        """Take a holder from each of `blocks`; returns those that became free.

        Raises:
            InvariantError: a block has no holder left to take (it was freed twice); nothing was changed.
        """
        wanted = Counter(blocks)
        for block, times in wanted.items():
            if not (0 <= block < self.n_total and self._references[block] >= times):
                raise InvariantError(f"block {block} is released {times} times but not held as often")
        freed = []
        for block, times in wanted.items():
            self._references[block] -= times
            if not self._references[block]:
                heapq.heappush(self._free, block)
                freed.append(block)
        return freed

    def lowest_free(self, n_blocks: int) -> list[int]:
        """The `n_blocks` blocks that `alloc` would hand out next, or all that are free."""
        return heapq.nsmallest(n_blocks, self._free)

    def relocate(self, moves: Mapping[int, int]) -> None:
        """Let free blocks take over the holders of others: new id by old.

        Raises:
            InvariantError: an old block is not held, or a new one not free; nothing was changed.
        """
        targets = set(moves.values())
        if not all(map(self._is_held, moves)) or len(targets) < len(moves) or not targets <= set(self._free):
            raise InvariantError(f"held blocks move to free ones, got {dict(moves)}")
        for source, target in moves.items():
            self._references[target] = self._references[source]
            self._references[source] = 0
        self._free = [block for block in self._free if block not in targets] + list(moves)
        heapq.heapify(self._free)

    def references(self, block: int) -> int:
        """How many holders `block` has."""
        return self._references[block]

    def check(self, live: Iterable[Sequence[int]], cached: Iterable[Sequence[int]] = ()) -> PoolUsage:
        """Verify the books against all block tables there are, those of sequences and those of checkpoints.

        Raises:
            InvariantError: a count, the free list or the sum free + held + cached = total is wrong.
        """
        live_counts = Counter(block for table in live for block in table)
        cached_counts = Counter(block for table in cached for block in table)
        for block in range(self.n_total):
            expected = live_counts[block] + cached_counts[block]
            if self._references[block] != expected:
                raise InvariantError(
                    f"block {block} has {self._references[block]} references but stands {expected} times in tables"
                )
        if stray := [block for block in live_counts | cached_counts if not 0 <= block < self.n_total]:
            raise InvariantError(f"tables name blocks {stray}, which do not exist")
        if sorted(self._free) != [block for block in range(self.n_total) if not self._references[block]]:
            raise InvariantError("the free list is not the list of blocks without references")
        usage = PoolUsage(self.n_free, len(live_counts), len(cached_counts.keys() - live_counts.keys()), self.n_total)
        if usage.free + usage.held + usage.cached != usage.total:
            raise InvariantError(f"free + held + cached is not total: {usage}")
        return usage

    def _is_held(self, block: int) -> bool:
        return 0 <= block < self.n_total and self._references[block] > 0
