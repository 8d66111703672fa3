"""The bytes of one group: slabs of blocks, and what is read from and written into them. No ids are handed out here."""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stratakv.blocks.append import Appender
from stratakv.blocks.ram import LEAST_BYTES, zeros, zeros_on
from stratakv.codecs import Codec, get_codecs
from stratakv.errors import InvariantError, StateError
from stratakv.plan import ReadPlan, Segment, WritePlan
from stratakv.spec import GroupSpec, Member

SLAB_BLOCKS = 16
"""A slab has up to this many blocks, so that a good part of a long prompt's can be given back one by one."""
FEW_BLOCKS = 64
"""Of recent rows few blocks stay of a long prompt's, so that the first ones are in slabs of two."""

_Pages = Callable[[Tensor, Member], Tensor]


@dataclass(slots=True)
class Slab:
    """Blocks `[first, first + n_blocks)`. One uint8 tensor `[n_blocks, member.nbytes]` for each member of the group.

    A layer's blocks lie side by side, so that one layer's attention reads one stretch of memory.
    """

    first: int
    n_blocks: int
    members: list[Tensor]


class Addresses:
    """Where the slabs of one member lie: to be held as long as a kernel uses them.

    Attributes:
        slabs: their tensors.
        table: int64 `[n_slabs]`, their addresses.
        at: the address of the table.
    """

    __slots__ = ("at", "slabs", "table")

    def __init__(self, slabs: list[Tensor]) -> None:
        self.slabs = slabs
        self.table = array("q", [slab.data_ptr() for slab in slabs])
        self.at = self.table.buffer_info()[0]


class Arena:
    """Pages of one group, in slabs that are added and removed whole: growth copies nothing."""

    def __init__(self, spec: GroupSpec, device: torch.device) -> None:
        self.spec = spec
        self.k_codec, self.v_codec = get_codecs(spec.k_format, spec.v_format)
        self.device = device
        self.slabs: list[Slab] = []
        self.bytes_copied = 0  # by growth; copies on write and compactions are not growth
        self._addresses: dict[int, Addresses] = {}
        self.appender = Appender.if_built(device)
        self.version = 0
        """Rises when blocks move, change in size or lose their memory."""

    @property
    def n_blocks(self) -> int:
        """Blocks that have memory."""
        return sum(slab.n_blocks for slab in self.slabs)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(tensor.numel() for slab in self.slabs for tensor in slab.members)

    def new_slabs(self, n_blocks: int, spec: GroupSpec) -> list[Slab]:
        """Empty slabs with `n_blocks` blocks more, laid out as `spec` says, for `extend`.

        Raises:
            MemoryError: the system has no room for them.
        """
        slabs, first, end = [], self.n_blocks, self.n_blocks + n_blocks
        while first < end:
            is_few = spec.recent_of is not None and first < FEW_BLOCKS
            n = min(2 if is_few else SLAB_BLOCKS, end - first)
            slabs.append(Slab(first, n, self._new_members(n, spec)))
            first += n
        return slabs

    def extend(self, slabs: Sequence[Slab]) -> None:
        """Take in slabs of `new_slabs`."""
        self.slabs.extend(slabs)
        self._addresses = {}

    def shrink(self, n_blocks: int) -> int:
        """Give back the last slabs that lie wholly behind block `n_blocks`; returns the number of blocks left."""
        while self.slabs and self.slabs[-1].first >= n_blocks:
            self.slabs.pop()
            self._moved()
        return self.n_blocks

    def other_members(self, spec: GroupSpec) -> list[list[Tensor]]:
        """The members' bytes of each slab as `respec` needs them: those that differ in `spec` start anew.

        Raises:
            MemoryError: the system has no room for them.
        """
        return [
            [
                tensor if old == new else self._zeros(slab.n_blocks, new)
                for tensor, old, new in zip(slab.members, self.spec.members, spec.members, strict=True)
            ]
            for slab in self.slabs
        ]

    def respec(self, spec: GroupSpec, members: list[list[Tensor]]) -> None:
        """Take on `spec`, which differs in what a member's pages look like, with the bytes of `other_members`."""
        self._moved()
        for slab, tensors in zip(self.slabs, members, strict=True):
            slab.members = tensors
        self.spec = spec

    def enlarged_slabs(self, spec: GroupSpec) -> list[Slab]:
        """Empty slabs as `enlarge` needs them. The system commits their memory when they are written, not here."""
        return [
            Slab(slab.first, slab.n_blocks, [self._zeros(slab.n_blocks, member) for member in spec.members])
            for slab in self.slabs
        ]

    def enlarge(self, spec: GroupSpec, slabs: list[Slab]) -> None:
        """Take on `spec`, which differs in having more rows in a block, and copy all rows into `slabs`.

        Members are copied one after the other, and what was copied is let go: at the peak the old and the new bytes of
        one member live together, or of all members where they are so small that they share memory.
        """
        self._moved()  # first, since addresses hold slabs
        for old_slab, new_slab in zip(self.slabs, slabs, strict=True):
            for m, (old, new) in enumerate(zip(self.spec.members, spec.members, strict=True)):
                source, target = old_slab.members[m], new_slab.members[m]
                self.k_codec.move(old.k_layout, _k_pages(source, old), new.k_layout, _k_pages(target, new))
                self.v_codec.move(old.v_layout, _v_pages(source, old), new.v_layout, _v_pages(target, new))
                self.bytes_copied += source.numel()
                old_slab.members[m] = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.slabs, self.spec = slabs, spec

    def locate(self, block: int) -> tuple[int, int]:
        """(slab, block within the slab) of a block id."""
        at = bisect.bisect_right(self.slabs, block, key=lambda slab: slab.first) - 1
        return at, block - self.slabs[at].first

    def segments(self, sequence: int, block_ids: Sequence[int]) -> list[Segment]:
        """A sequence's blocks as stretches that lie side by side."""
        found: list[Segment] = []
        for at, block in enumerate(block_ids):
            slab, index = self.locate(block)
            last = found[-1] if found else None
            if last and last.slab == slab and last.first + last.count == index:
                found[-1] = replace(last, count=last.count + 1)
            else:
                found.append(Segment(sequence, slab, index, 1, at))
        return found

    def write(self, member: int, plan: WritePlan, keys: Tensor, values: Tensor, *, in_groups: bool = False) -> None:
        """Store new rows of one member.

        Args:
            member: index in the group's members.
            plan: where the rows go.
            keys: `[n_sequences, n_heads, n_tokens, k_dim]`, the member's heads only.
            values: `[n_sequences, n_heads, n_tokens, v_dim]`.
            in_groups: store those of keys and values whose rows are coded together, or only the others. `plan` then
                begins with a group, and ends with one or with the last row there will be.

        Raises:
            StateError: blocks moved since the plan was made. Nothing was written.
        """
        self.check_version(plan)
        spec = self.spec.members[member]
        if self.appender and self.appender.write(self, member, plan, keys, values, in_groups=in_groups):
            return
        keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (keys, values))  # [n_sequences * n_tokens, n_heads, d]
        for place in plan.places:
            pages = self.slabs[place.slab].members[member]
            for codec, layout, part, new in (
                (self.k_codec, spec.k_layout, _k_pages(pages, spec), keys),
                (self.v_codec, spec.v_layout, _v_pages(pages, spec), values),
            ):
                if (codec.group_rows(layout.block_tokens) > 1) == in_groups:
                    chosen = new if place.chosen is None else new[place.chosen]
                    codec.encode(layout, part, place.block, place.row, chosen)

    def read(self, member: int, plan: ReadPlan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The stored rows of one member, decoded.

        Returns:
            keys `[n_sequences, n_heads, n_rows, k_dim]` and values `[n_sequences, n_heads, n_rows, v_dim]`. They are
            views of the pages where no copy is needed, and good for the present step only.

        Raises:
            StateError: blocks moved since the plan was made.
        """
        self.check_version(plan)
        spec = self.spec.members[member]
        tensors = []
        for is_key, codec, layout in ((True, self.k_codec, spec.k_layout), (False, self.v_codec, spec.v_layout)):
            pages_of = _k_pages if is_key else _v_pages
            view = self._in_place(plan, member, pages_of, codec, is_key, dtype)
            if view is None:
                shape = (plan.n_sequences, len(spec.heads), plan.n_blocks, plan.block_tokens, layout.head_dim)
                out = torch.empty(shape, dtype=dtype, device=self.device)
                for part in plan.segments:
                    pages = pages_of(self.slabs[part.slab].members[member], spec)[part.first : part.first + part.count]
                    target = out[part.sequence, :, part.at : part.at + part.count]
                    codec.decode(layout, pages, target.transpose(0, 1))
                view = out.flatten(2, 3)
            tensors.append(view[:, :, plan.skip : plan.skip + plan.n_rows])
        return tensors[0], tensors[1]

    def addresses(self, member: int) -> Addresses:
        """Where the bytes of one member lie, for kernels that read pages in place."""
        known = self._addresses
        if member not in known:
            known[member] = Addresses([slab.members[member] for slab in self.slabs])
        return known[member]

    def relocate(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy whole blocks whose ids change: (old id, new id)."""
        self.copy(pairs)
        self.version += 1

    def copy(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy whole blocks: (source id, target id)."""
        for source, target in pairs:
            (s, i), (t, j) = self.locate(source), self.locate(target)
            for from_, to in zip(self.slabs[s].members, self.slabs[t].members, strict=True):
                to[j].copy_(from_[i])

    def move_rows(self, rows: Sequence[int], old_blocks: Sequence[int], new_blocks: Sequence[int]) -> None:
        """Copy `rows`, numbered in a table of `old_blocks`, to the rows 0, 1, ... of a table of `new_blocks`.

        They are copied as they are stored: what was rounded once is not rounded again.
        """
        span = self.spec.block_tokens
        writing = WritePlan(len(rows), 0, span, (tuple(self.locate(block) for block in new_blocks),), self.version)
        moved = torch.tensor(rows, device="cpu")
        homes = [self.locate(old_blocks[row // span]) for row in rows]
        old_slab, old_block = torch.tensor(homes, device="cpu").unbind(1)
        for place in writing.places:
            chosen = torch.arange(len(rows), device="cpu") if place.chosen is None else place.chosen
            for slab in old_slab[chosen].unique().tolist():
                which = old_slab[chosen] == slab
                taken = (old_block[chosen][which], moved[chosen][which] % span)
                placed = (place.block[which], place.row[which])
                for m, spec in enumerate(self.spec.members):
                    source, target = (self.slabs[s].members[m] for s in (slab, place.slab))
                    for codec, layout, pages_of in (
                        (self.k_codec, spec.k_layout, _k_pages),
                        (self.v_codec, spec.v_layout, _v_pages),
                    ):
                        stored = codec.take(layout, pages_of(source, spec), *taken)
                        codec.place(layout, pages_of(target, spec), *placed, stored)

    def dump(self, block_ids: Sequence[int], n_rows: int) -> list[Tensor]:
        """Copies of the blocks of one sequence, one uint8 `[n_blocks, member.nbytes]` a member, stale rows cleared."""
        dumped = []
        for m, spec in enumerate(self.spec.members):
            out = self._zeros(len(block_ids), spec)
            for part in self.segments(0, block_ids):
                slab = self.slabs[part.slab].members[m]
                out[part.at : part.at + part.count] = slab[part.first : part.first + part.count]
            if tail := n_rows % self.spec.block_tokens:
                self.k_codec.scrub(spec.k_layout, _k_pages(out, spec)[-1], tail)
                self.v_codec.scrub(spec.v_layout, _v_pages(out, spec)[-1], tail)
            dumped.append(out)
        return dumped

    def load(self, block_ids: Sequence[int], dumped: Sequence[Tensor]) -> None:
        """Put back what `dump` gave, into blocks that already have memory."""
        for m, spec in enumerate(self.spec.members):
            if dumped[m].shape != (len(block_ids), spec.nbytes):
                raise InvariantError(
                    f"{tuple(dumped[m].shape)} bytes do not fill {len(block_ids)} blocks of {spec.nbytes}"
                )
            for part in self.segments(0, block_ids):
                target = self.slabs[part.slab].members[m]
                target[part.first : part.first + part.count] = dumped[m][part.at : part.at + part.count]

    def poison(self, block_ids: Iterable[int]) -> None:
        """Fill blocks with ones, which is NaN in every float format: whoever reads a freed row will show it."""
        for block in block_ids:
            slab, index = self.locate(block)
            for tensor in self.slabs[slab].members:
                tensor[index].fill_(0xFF)

    def check_version(self, plan: ReadPlan | WritePlan) -> None:
        """Raise StateError where blocks moved since `plan` was made."""
        if plan.version != self.version:
            raise StateError("blocks moved since this view was made; a view is good for one step of its cache")

    def _moved(self) -> None:
        self._addresses = {}
        self.version += 1

    def _new_members(self, n_blocks: int, spec: GroupSpec) -> list[Tensor]:
        """The members' bytes for a slab; side by side in RAM where that makes them long enough for large pages."""
        sizes = [n_blocks * member.nbytes for member in spec.members]
        if self.device.type != "cpu" or max(sizes) >= LEAST_BYTES or sum(sizes) < LEAST_BYTES:
            return [self._zeros(n_blocks, member) for member in spec.members]
        return [part.view(n_blocks, -1) for part in zeros(sum(sizes)).split(sizes)]

    def _zeros(self, n_blocks: int, member: Member) -> Tensor:
        # Zeros, not empty: the system hands out zeroed memory lazily anyway, and a page never holds another's data.
        nbytes = n_blocks * member.nbytes
        found = zeros(nbytes) if self.device.type == "cpu" else zeros_on(self.device, nbytes)
        return found.view(n_blocks, member.nbytes)

    def _in_place(
        self, plan: ReadPlan, member: int, pages_of: _Pages, codec: Codec, is_key: bool, dtype: torch.dtype
    ) -> Tensor | None:
        """The rows as a view of the pages, where each sequence is one block and the blocks lie side by side."""
        first = plan.segments[0] if plan.segments else None
        if first is None or plan.n_blocks != 1:
            return None
        if any(s.slab != first.slab or s.first != first.first + i for i, s in enumerate(plan.segments)):
            return None
        spec = self.spec.members[member]
        pages = pages_of(self.slabs[first.slab].members[member], spec)[first.first : first.first + plan.n_sequences]
        return codec.typed(spec.k_layout if is_key else spec.v_layout, pages, dtype)


def _k_pages(member_bytes: Tensor, member: Member) -> Tensor:
    """uint8 `[n_blocks, n_heads, k page bytes]` of a member's bytes."""
    n_heads = len(member.heads)
    pages: Tensor = member_bytes[:, : n_heads * member.k_layout.nbytes].unflatten(1, (n_heads, member.k_layout.nbytes))
    return pages


def _v_pages(member_bytes: Tensor, member: Member) -> Tensor:
    """uint8 `[n_blocks, n_heads, v page bytes]` of a member's bytes."""
    n_heads = len(member.heads)
    pages: Tensor = member_bytes[:, n_heads * member.k_layout.nbytes :].unflatten(1, (n_heads, member.v_layout.nbytes))
    return pages
