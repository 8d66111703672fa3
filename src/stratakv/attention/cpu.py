"""Attention over pages by the C++ kernels: nothing is gathered, every byte of K and V is read where it lies."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stratakv.attention.base import AttentionBackend, AttentionOptions, check_call, hidden_below, query_heads
from stratakv.blocks.arena import Addresses
from stratakv.blocks.view import KVPart, KVView
from stratakv.errors import ConfigurationError, InvariantError
from stratakv.extension import FLOAT_FORMATS, FORMATS, MOST_PACKED_DIM, NUMBER_TYPES, load_kernels
from stratakv.plan import ReadPlan
from stratakv.tensors import has_numbers

MASK_BOOL, MASK_FLOAT, MASK_BIAS = 1, 2, 3
MOST_POSITIONS = 2**31 - 1
PREFILL_QUERIES = 24
"""With so many queries a KV head (new tokens times query heads) the kernel for prompts is the faster one: measured with
head dims 64 and 128, fp32 and bf16 pages, 512 to 4096 rows. It gives a thread no less than that."""


class CpuBackend(AttentionBackend):
    """Attention over pages in RAM, with a kernel for few queries and one for many.

    Args:
        isa: one of `instruction_sets()`; None: what the environment variable STRATAKV_ISA names, or the best.

    Raises:
        UnsupportedError: the extension is not there. ConfigurationError: this processor has no `isa`.
    """

    name = "cpu"

    def __init__(self, isa: str | None = None) -> None:
        self._kernels, self.isa = load_kernels(isa)
        self._last: tuple[ReadPlan, tuple[object, ...], _Call] | None = None

    def supports(self, view: KVView, options: AttentionOptions, dtype: torch.dtype) -> str | None:
        """Pages in RAM, in any of the library's formats."""
        del options
        if dtype not in NUMBER_TYPES:
            return f"queries are {dtype}"
        for part in view.parts:
            arena = part.arena
            if arena.device.type != "cpu":
                return f"pages are on {arena.device}"
            formats = arena.spec.k_format, arena.spec.v_format
            if not FORMATS.keys() >= set(formats):
                return f"pages are stored as {' and '.join(formats)}"
            if max(view.k_dim, view.v_dim) > MOST_PACKED_DIM and not set(FLOAT_FORMATS) >= set(formats):
                return (
                    f"head dims are {view.k_dim} and {view.v_dim}, where rows of few bits have at most "
                    f"{MOST_PACKED_DIM}"
                )
        return None

    def run(self, query: Tensor, view: KVView, options: AttentionOptions) -> tuple[Tensor, Tensor]:
        """Attend part by part: the heads of a part hold the same rows."""
        if len(view.parts) == 1 and options.mask is None and options.bias is None and options.sinks is None:
            return self._plain_call(query, view, options).run(view.parts[0], query)
        self._check(query, view, options)
        table, kind = _added(options)
        if len(view.parts) == 1:
            asked = _Asked(query, view, options, options.sinks, table, kind)
            return self._new_call(view.parts[0], asked).run(view.parts[0], query)
        out, lse = _room(query, view.v_dim)
        for part in view.parts:
            heads = query_heads(part, query.shape[1] // view.n_kv_heads)
            sinks = None if options.sinks is None else options.sinks[heads]
            own = table if table is None or table.shape[1] == 1 else table[:, heads]
            asked = _Asked(query[:, heads], view, options, sinks, own, kind)
            out[:, heads], lse[:, heads] = self._new_call(part, asked).run(part, asked.query)
        return out, lse

    def _check(self, query: Tensor, view: KVView, options: AttentionOptions) -> None:
        check_call(query, view, options)
        if reason := self.supports(view, options, query.dtype):
            raise ConfigurationError(f"the kernels do not serve this call: {reason}")

    def _plain_call(self, query: Tensor, view: KVView, options: AttentionOptions) -> _Call:
        """A call without mask or sinks: the one of the layer before, where it was the same but for its memory.

        Then nothing is checked again. Between two layers other data fill the processor's caches, so that every object
        that is looked at costs a wait for memory: all checks together took as long as half a thousand rows.
        """
        part = view.parts[0]
        facts = (
            *(part.arena.spec.kinds[part.member], part.retention, options.scale, options.softcap, options.causal),
            None if part.recent is None else part.recent.plan,
            *(view.n_kv_heads, view.seen_tokens, view.n_new, view.n_sequences, view.k_dim, view.v_dim),
            *(query.shape, query.dtype, query.is_cpu and has_numbers(query), torch.get_num_threads()),
        )
        last = self._last  # which nobody changes, so that threads may share it
        if last is None or last[0] is not part.plan or last[1] != facts:
            self._check(query, view, options)
            last = self._last = part.plan, facts, self._new_call(part, _Asked(query, view, options))
        return last[2]

    def _new_call(self, part: KVPart, asked: _Asked) -> _Call:
        """A call, but for where its numbers lie: over all rows of a part, recent ones included."""
        strands = [
            self._new_strand(each, asked) for each in (part, part.recent) if each is not None and each.plan.n_rows
        ]
        is_recent = part.recent is not None and not part.plan.n_rows
        return _Call(strands or [self._new_strand(part, asked)], is_recent, asked)

    def _new_strand(self, part: KVPart, asked: _Asked) -> tuple[Any, tuple[object, ...]]:
        """A call over the rows of a part alone, and what it has the addresses of."""
        query, view, options = asked.query, asked.view, asked.options
        step, plan, arena = self._kernels.Step(self.isa), part.plan, part.arena
        member = arena.spec.members[part.member]
        table, positions = plan.table, None if plan.is_one_run else plan.row_positions
        first = (plan.runs[0][0] if plan.runs else 0) - plan.skip
        retention = part.retention
        sinks = None if asked.sinks is None else asked.sinks.float().resolve_neg().contiguous()
        step.set_pages(table.data_ptr(), table.stride(0), plan.n_sequences, len(member.heads), plan.block_tokens)
        step.set_member(
            member.nbytes,
            member.k_layout.nbytes,
            member.v_layout.nbytes,
            view.k_dim,
            view.v_dim,
            FORMATS[arena.k_codec.name],
            FORMATS[arena.v_codec.name],
        )
        step.set_rules(
            options.scale,
            options.softcap or 0.0,
            options.causal and options.mask is None,
            0 if retention is None or retention.window is None else min(retention.window, MOST_POSITIONS),
            0 if retention is None else min(retention.sinks, MOST_POSITIONS),
            0,
            0 if sinks is None else sinks.data_ptr(),
        )
        each = [
            array("i", [x]) * plan.n_sequences for x in (plan.skip + plan.n_rows, plan.skip, first, view.seen_tokens)
        ]
        counts, skips, firsts, queries = (numbers.buffer_info()[0] for numbers in each)
        step.set_rows(counts, skips, firsts, 0 if positions is None else positions.data_ptr(), queries)
        group = query.shape[1] // len(member.heads)
        step.set_queries(group, view.n_new, NUMBER_TYPES[query.dtype], torch.get_num_threads(), PREFILL_QUERIES)
        hidden, kind = asked.mask, asked.mask_kind
        if hidden is not None:
            if hidden.dtype != (torch.bool if kind == MASK_BOOL else torch.float32):
                raise InvariantError(f"a mask of kind {kind} came to the kernels as {hidden.dtype}")
            strides = (s if size > 1 else 0 for s, size in zip(hidden.stride()[:3], hidden.shape[:3], strict=True))
            step.set_mask(hidden.data_ptr(), *strides, kind, options.mask_offset)
        return step, (table, positions, sinks, hidden, *each)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is asked of some KV heads: their queries and sinks, and their mask with its kind (see MaskKind)."""

    query: Tensor
    view: KVView
    options: AttentionOptions
    sinks: Tensor | None = None
    mask: Tensor | None = None
    mask_kind: int = 0


class _Call:
    """A call of a kernel over one strand of rows or two, with what it has the addresses of: that is held meanwhile.

    Args:
        strands: the steps and what they hold.
        is_recent: the one strand is that of the recent rows.
        asked: of these heads.
    """

    def __init__(self, strands: list[tuple[Any, tuple[object, ...]]], is_recent: bool, asked: _Asked) -> None:
        self._steps = [step for step, _ in strands]
        self._held = [held for _, held in strands]
        self._is_recent = is_recent
        _, n_heads, n_new, dim = asked.query.shape
        self._v_dim = asked.view.v_dim
        # A dense query of one token is shaped as its output, and torch needs half the time for room like another's.
        self._row_strides, self._lse_like = (n_heads * dim, dim, dim), None
        if n_new == 1 and dim == self._v_dim:
            self._lse_like = torch.empty(asked.query.shape[:3], dtype=torch.float32, device="cpu")

    def run(self, part: KVPart, query: Tensor) -> tuple[Tensor, Tensor]:
        """The output and its log-sum-exp."""
        query = query.resolve_neg()
        if self._lse_like is not None and query.is_contiguous():
            out, lse = torch.empty_like(query), torch.empty_like(self._lse_like)
            strides: tuple[int, ...] = self._row_strides
            out_strides = strides
        else:
            query = query if query.stride(3) == 1 else query.contiguous()
            out, lse = _room(query, self._v_dim)
            strides, out_strides = query.stride()[:3], out.stride()[:3]
        operands = query.data_ptr(), strides, out.data_ptr(), out_strides, lse.data_ptr()
        if len(self._steps) == 1:
            pages = _pages_of(part.recent if self._is_recent else part)
            self._steps[0].run(pages.at, *operands)
        else:
            pages, recent = _pages_of(part), _pages_of(part.recent)
            self._steps[1].run_after(self._steps[0], pages.at, recent.at, *operands)
        return out, lse


def _pages_of(strand: KVPart | None) -> Addresses:
    """Where they lie, which is to be held until the kernel is done."""
    assert strand is not None
    strand.arena.check_version(strand.plan)
    return strand.arena.addresses(strand.member)


def _room(query: Tensor, v_dim: int) -> tuple[Tensor, Tensor]:
    """For the output and its log-sum-exp."""
    n_sequences, n_query_heads, n_new, _ = query.shape
    out = query.new_empty((n_sequences, n_new, n_query_heads, v_dim)).transpose(1, 2)
    return out, query.new_empty((n_sequences, n_query_heads, n_new), dtype=torch.float32)


def _added(options: AttentionOptions) -> tuple[Tensor | None, int]:
    """What the kernel adds to the scores or hides them by, with dense columns, and its kind (see MaskKind)."""
    mask, bias = options.mask, options.bias
    if mask is None and bias is None:
        return None, 0
    if bias is None:
        assert mask is not None
        if mask.dtype == torch.bool:
            return _dense(mask), MASK_BOOL
        # Models mark what is hidden with the smallest number of the mask's own dtype, which in fp16 is not very small.
        return _dense(mask if mask.dtype == torch.float32 else _hiding(mask)), MASK_FLOAT
    if mask is None:
        return _dense(bias.float()), MASK_BIAS
    n = min(mask.shape[3], bias.shape[3])  # both cover the rows
    mask, added = mask[..., :n], bias[..., :n].float()
    if mask.dtype == torch.bool:
        return _dense(added.masked_fill(~mask, -torch.inf)), MASK_BIAS
    return _dense(_hiding(mask, added)), MASK_BIAS


def _hiding(mask: Tensor, added: Tensor | float = 0.0) -> Tensor:
    """A float mask in fp32, with something added, that has -inf where it hides."""
    return (mask.float() + added).masked_fill(mask < hidden_below(mask.dtype), -torch.inf)


def _dense(table: Tensor) -> Tensor:
    table = table.resolve_neg()
    return table if table.stride(3) == 1 or table.shape[3] == 1 else table.contiguous()
