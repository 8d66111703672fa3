"""New rows into pages by the kernels: all of a layer's in one pass, which rounds and writes them."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stratakv.extension import (
    FLOAT_FORMATS,
    FORMATS,
    MOST_PACKED_DIM,
    NUMBER_TYPES,
    is_built,
    load_kernels,
)
from stratakv.plan import WritePlan

if TYPE_CHECKING:
    from stratakv.blocks.arena import Arena


class Appender:
    """Writes what `Arena.write` is given. What a row becomes is the codecs' to say; the kernels give the same bytes.

    Args:
        isa: one of `instruction_sets()`; None: what the environment variable STRATAKV_ISA names, or the best. The
            processor is asked when the first rows come: a cache can be made and looked at without.
    """

    def __init__(self, isa: str | None = None) -> None:
        self._given_isa = isa
        self._loaded: tuple[Any, str] | None = None
        self._last: tuple[WritePlan, tuple[object, ...], Any, array[int]] | None = None

    @classmethod
    def if_built(cls, device: torch.device) -> Appender | None:
        """One for pages on `device`, or None where there are no kernels for it."""
        return cls() if device.type == "cpu" and is_built() else None

    def write(
        self, arena: Arena, member: int, plan: WritePlan, keys: Tensor, values: Tensor, *, in_groups: bool
    ) -> bool:
        """Write the rows, or say that kernels cannot. Arguments as for `Arena.write`."""
        spec = arena.spec.members[member]
        dims = spec.k_layout.head_dim, spec.v_layout.head_dim
        formats = arena.spec.k_format, arena.spec.v_format
        is_served = (
            keys.is_cpu
            and values.is_cpu
            and keys.dtype in NUMBER_TYPES
            and values.dtype == keys.dtype
            and FORMATS.keys() >= set(formats)
            and (max(dims) <= MOST_PACKED_DIM or set(FLOAT_FORMATS) >= set(formats))
        )
        if not is_served:
            return False
        facts = len(spec.heads), spec.k_layout, spec.v_layout, in_groups, torch.get_num_threads()
        last = self._last
        if last is None or last[0] is not plan or last[1] != facts:
            last = self._last = plan, facts, *self._new_call(arena, member, plan, in_groups=in_groups)
        addresses = arena.addresses(member)
        keys, values = _dense(keys), _dense(values)
        last[2].run(
            addresses.at,
            keys.data_ptr(),
            keys.stride()[:3],
            values.data_ptr(),
            values.stride()[:3],
            NUMBER_TYPES[keys.dtype],
        )
        for slab in {slab for table in plan.tables for slab, _ in table}:
            torch.autograd.graph.increment_version(addresses.slabs[slab])  # whoever saved a view of it shall know
        return True

    def _new_call(self, arena: Arena, member: int, plan: WritePlan, *, in_groups: bool) -> tuple[Any, array[int]]:
        """A call, but for where its numbers lie, and what it has the address of."""
        self._loaded = self._loaded or load_kernels(self._given_isa)
        kernels, isa = self._loaded
        spec, call, table = arena.spec.members[member], kernels.Append(isa), plan.table
        n_sequences = len(plan.tables)
        call.set_pages(
            table.buffer_info()[0], len(table) // n_sequences, n_sequences, len(spec.heads), plan.block_tokens
        )
        call.set_member(
            spec.nbytes,
            spec.k_layout.nbytes,
            spec.v_layout.nbytes,
            spec.k_layout.head_dim,
            spec.v_layout.head_dim,
            FORMATS[arena.k_codec.name],
            FORMATS[arena.v_codec.name],
        )
        call.set_rows(plan.row % plan.block_tokens, plan.n_tokens, in_groups, torch.get_num_threads())
        return call, table


def _dense(rows: Tensor) -> Tensor:
    rows = rows.detach().resolve_neg()
    return rows if rows.stride(3) == 1 else rows.contiguous()
