"""Pools and arenas of all groups, and everything that has to happen in both at once: ids first, bytes with them."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import ExitStack, contextmanager

import torch

from stratakv.blocks.advance import Advance, Change, plan_advance
from stratakv.blocks.arena import Arena
from stratakv.blocks.audit import MemoryUsage, audit
from stratakv.blocks.budget import Budget
from stratakv.blocks.consolidation import consolidate, give_back
from stratakv.blocks.geometry import with_block_tokens, with_layer
from stratakv.blocks.interrupts import uninterrupted
from stratakv.blocks.pool import BlockPool
from stratakv.blocks.sequence import GroupTable, Ledger, Sequence
from stratakv.errors import CapacityError, StateError
from stratakv.spec import CacheSpec, LayerSpec, aligned

SLAB_BYTES = 64 << 20
"""Growth adds an eighth of what exists, beyond what is needed now, up to this."""


class Memory:
    """Blocks of all groups, shared by a cache and its forks.

    Args:
        spec: what is stored.
        device: where.
        max_bytes: limit over all groups, or None.
        budget: the same, shared with other memories.
        poison: fill blocks with NaN when they are freed, so that a stale read cannot go unnoticed. For tests.
    """

    def __init__(
        self,
        spec: CacheSpec,
        *,
        device: torch.device,
        max_bytes: int | None = None,
        budget: Budget | None = None,
        poison: bool = False,
    ) -> None:
        self.spec = spec
        self.device = device
        self.budget = budget or Budget(max_bytes)
        self.poison = poison
        self.arenas = tuple(Arena(group, device) for group in spec.groups)
        self.ledger = Ledger(spec.groups, tuple(BlockPool() for _ in spec.groups))
        self._live: weakref.WeakSet[Sequence] = weakref.WeakSet()
        self._cached: weakref.WeakSet[Sequence] = weakref.WeakSet()
        # Tables of sequences that were garbage collected. Collection can strike anywhere, in the middle of a pool's
        # bookkeeping too, so their blocks are released at the next safe point.
        self._orphans: deque[tuple[GroupTable, ...]] = deque()
        self._left_free = False  # whether rows left since slabs were last given back

    @property
    def budget(self) -> Budget:
        """What this memory may hold, perhaps with others."""
        return self._budget

    @budget.setter
    def budget(self, budget: Budget) -> None:
        self._budget = budget
        budget.admit(self)

    @property
    def max_bytes(self) -> int | None:
        """The budget's limit."""
        return self._budget.max_bytes

    @max_bytes.setter
    def max_bytes(self, max_bytes: int | None) -> None:
        self._budget.max_bytes = max_bytes

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(arena.nbytes for arena in self.arenas)

    def new_sequence(self) -> Sequence:
        """An empty live sequence."""
        return self._adopt(Sequence(self.ledger), self._live)

    def fork(self, sequence: Sequence, *, as_checkpoint: bool = False) -> Sequence:
        """A twin of `sequence` over the same blocks, live or held for a checkpoint."""
        return self._adopt(sequence.fork(), self._cached if as_checkpoint else self._live)

    def release(self, sequences: Seq[Sequence]) -> None:
        """Let go of the blocks of `sequences`."""
        for sequence in sequences:
            self._poison(sequence.release())
        self._shrink()

    def truncate(self, sequences: Seq[Sequence], n_tokens: int) -> None:
        """Cut every one of `sequences` to `n_tokens`, or raise StateError and leave all as they were."""
        for sequence in sequences:
            if reason := sequence.can_truncate(n_tokens):
                raise StateError(reason)
        for sequence in sequences:
            self._poison(sequence.truncate(n_tokens))
        self._shrink()

    def append(self, sequences: Seq[Sequence], n_tokens: int, changes: Seq[Change] = ()) -> None:
        """Make room for `n_tokens` more rows in every group of every sequence, or change nothing.

        Args:
            sequences: what grows.
            n_tokens: rows.
            changes: compactions to do first, whose blocks serve the new rows.

        Raises:
            ConfigurationError: a change names positions that are not stored.
            CapacityError: over the capacity or over `max_bytes`, or the system has no more memory.
        """
        if changes or self._left_free:
            self.settle()  # first, what can fail: slabs that earlier steps left free go back
        self.settle_orphans()
        spec = self._fitting_spec(self._check_capacity(sequences, n_tokens))
        advance = plan_advance(self.ledger, spec.groups, sequences, n_tokens, changes)
        self._reserve(advance.n_free, spec)
        self._compact(advance)  # whose blocks serve the rows to come, so that a full cache can go on
        self._left_free = bool(changes)
        self._grow(advance, n_tokens)

    def compact(self, changes: Seq[Change]) -> None:
        """Keep only the rows of each plan in one group of one sequence, and free the blocks that are left over.

        Raises:
            ConfigurationError: a plan names positions that are not stored.
            CapacityError: rows have to move and no blocks are left to move them into. Nothing was changed.
        """
        self.settle_orphans()
        advance = plan_advance(self.ledger, self.spec.groups, (), 0, changes)
        self._reserve(advance.n_free, self.spec)
        self._compact(advance)
        self.settle()

    def respec_layer(self, layer: LayerSpec) -> None:
        """Take on other heads or head dims for a layer of which nothing is stored yet.

        Raises:
            CapacityError: what is reserved would then exceed `max_bytes`, or the system has no more memory. Nothing was
                changed.
        """
        changed = with_layer(self.spec, layer)
        enlarging = self._enlarging(changed)
        self.budget.check(enlarging)
        with _refused_memory(enlarging):
            members = [a.other_members(new) for a, new in zip(self.arenas, changed.groups, strict=True)]
        for arena, group, tensors in zip(self.arenas, changed.groups, members, strict=True):
            arena.respec(group, tensors)
        self._adopt_spec(changed)

    def claim(self, group: int, n_blocks: int) -> list[int]:
        """`n_blocks` blocks of one group, for rows that are loaded rather than appended.

        Raises:
            CapacityError: over `max_bytes`.
        """
        self._reserve([n_blocks if g == group else 0 for g in range(len(self.arenas))], self.spec)
        return self.ledger.pools[group].alloc(n_blocks)

    def settle_orphans(self) -> None:
        """Release the blocks of sequences that were garbage collected."""
        while self._orphans:
            tables = self._orphans.popleft()
            self._poison([p.release(t.block_ids) for p, t in zip(self.ledger.pools, tables, strict=True)])

    def settle(self) -> None:
        """Release what was garbage collected, and give back the slabs that are not needed."""
        held = [*self._live, *self._cached]  # none of these can become an orphan from here on
        self.settle_orphans()
        for g, (pool, arena) in enumerate(zip(self.ledger.pools, self.arenas, strict=True)):
            consolidate(pool, arena, [sequence.tables[g] for sequence in held])
        self._shrink()
        self._left_free = False

    @uninterrupted
    def check(self) -> MemoryUsage:
        """Verify every count, id and length there is.

        Raises:
            InvariantError: something does not add up.
        """
        live, cached = list(self._live), list(self._cached)  # none of these can become an orphan from here on
        self.settle_orphans()
        return audit(self.arenas, self.ledger.pools, live, cached)

    def holds_rows(self) -> bool:
        """Whether a sequence or checkpoint has tokens, those of an open step left out."""
        return any(sequence.seen_tokens for sequence in (*self._live, *self._cached))

    def _adopt(self, sequence: Sequence, registry: weakref.WeakSet[Sequence]) -> Sequence:
        registry.add(sequence)
        weakref.finalize(sequence, self._orphans.append, sequence.tables).atexit = False
        return sequence

    def _fitting_spec(self, n_rows: int) -> CacheSpec:
        """In the layout whose blocks grow, the one whose blocks hold `n_rows` rows."""
        groups = self.spec.groups
        if self.spec.layout != "growing":
            return self.spec
        spans = [g.block_tokens if g.retention.window else _doubled(g.block_tokens, n_rows) for g in groups]
        return with_block_tokens(self.spec, spans)

    def _compact(self, advance: Advance) -> None:
        """Do the compactions, or nothing. The blocks they take are free."""
        with ExitStack() as undo:
            new_blocks = []
            for sequence, g, _, change in advance.compactions:
                blocks = self._claimed(g, change.n_new, undo)
                new_blocks.append(blocks)
                if blocks:
                    self.arenas[g].move_rows(change.rows, sequence.tables[g].block_ids, blocks)
            undo.pop_all()  # nothing can fail from here on
        for (sequence, g, plan, change), blocks in zip(advance.compactions, new_blocks, strict=True):
            freed = sequence.compact(g, plan, change, blocks)
            self._poison([freed if each == g else [] for each in range(len(self.arenas))])

    def _grow(self, advance: Advance, n_tokens: int) -> None:
        """Append `n_tokens` rows, or nothing. The blocks they take are free."""
        with ExitStack() as undo:
            new_blocks = []
            for _, g, growth in advance.growths:
                blocks = self._claimed(g, growth.n_blocks, undo)
                new_blocks.append(blocks)
                if growth.replaces is not None:
                    self.arenas[g].copy([(growth.replaces, blocks[0])])
            undo.pop_all()  # nothing can fail from here on
        for (sequence, g, growth), blocks in zip(advance.growths, new_blocks, strict=True):
            sequence.append(g, n_tokens, growth, blocks)

    def _claimed(self, group: int, n_blocks: int, undo: ExitStack) -> list[int]:
        """`n_blocks` of the free blocks, which `undo` gives back."""
        pool = self.ledger.pools[group]
        blocks = pool.alloc(n_blocks)
        undo.callback(pool.release, blocks)
        return blocks

    def _check_capacity(self, sequences: Seq[Sequence], n_tokens: int) -> int:
        """The rows that each sequence will have in groups without a window. In the others old ones leave."""
        unbounded = [g for g, group in enumerate(self.spec.groups) if group.retention.window is None]
        rows = (sequence.tables[g].n_rows for sequence in sequences for g in unbounded)
        n_rows, capacity = max(rows, default=-n_tokens) + n_tokens, self.spec.capacity
        if capacity is not None and n_rows > capacity:
            raise CapacityError(f"{n_rows} tokens do not fit into the capacity of {capacity}; nothing was changed")
        return n_rows

    def _reserve(self, wanted: Seq[int], spec: CacheSpec) -> None:
        """Have `wanted[g]` free blocks in each group, of the size that `spec` has, or raise CapacityError.

        Raises:
            CapacityError: over `max_bytes`, or the system has no more memory. Nothing was changed.
        """
        short = [max(n - pool.n_free, 0) for n, pool in zip(wanted, self.ledger.pools, strict=True)]
        if not any(short) and spec == self.spec:
            return
        sizes = [group.bytes_per_block for group in spec.groups]
        generous = [
            max(n, min(pool.n_total // 8, SLAB_BYTES // size)) if n and self._is_paged(g) else n
            for g, (n, pool, size) in enumerate(zip(short, self.ledger.pools, sizes, strict=True))
        ]
        enlarging = self._enlarging(spec)
        needed = enlarging + sum(n * size for n, size in zip(short, sizes, strict=True))
        self.budget.check(needed)
        if not self.budget.allows(enlarging + sum(n * s for n, s in zip(generous, sizes, strict=True))):
            generous = short
        with _refused_memory(needed):
            prepared = [
                (arena.enlarged_slabs(group) if group != arena.spec else None, arena.new_slabs(n, group))
                for n, arena, group in zip(generous, self.arenas, spec.groups, strict=True)
            ]
        for (enlarged, added), pool, arena, group in zip(
            prepared, self.ledger.pools, self.arenas, spec.groups, strict=True
        ):
            if enlarged is not None:
                arena.enlarge(group, enlarged)
            arena.extend(added)
            pool.grow(sum(slab.n_blocks for slab in added))
        self._adopt_spec(spec)

    def _enlarging(self, spec: CacheSpec) -> int:
        """Bytes that the blocks there are take more with the pages of `spec`."""
        return sum(
            (new.bytes_per_block - old.bytes_per_block) * arena.n_blocks
            for new, old, arena in zip(spec.groups, self.spec.groups, self.arenas, strict=True)
        )

    def _is_paged(self, group: int) -> bool:
        return self.spec.layout == "paged" or self.spec.groups[group].retention.window is not None

    def _poison(self, blocks: Seq[Seq[int]]) -> None:
        """Where that was asked for, fill blocks of each group that were freed."""
        if self.poison:
            for arena, freed in zip(self.arenas, blocks, strict=True):
                arena.poison(freed)

    def _shrink(self) -> None:
        for pool, arena in zip(self.ledger.pools, self.arenas, strict=True):
            give_back(pool, arena)

    def _adopt_spec(self, spec: CacheSpec) -> None:
        self.spec = spec
        self.ledger.groups = spec.groups


@contextmanager
def _refused_memory(needed: int) -> Iterator[None]:
    """Give the system's refusal of `needed` bytes its name."""
    try:
        yield
    except MemoryError as error:
        raise CapacityError(f"the system has no {needed:,} bytes more for the cache; nothing was changed") from error


def _doubled(block_tokens: int, n_rows: int) -> int:
    # In whole tiles and groups of rows, so that none of those that are full grows.
    return block_tokens if n_rows <= block_tokens else aligned(max(2 * block_tokens, n_rows), block_tokens)
