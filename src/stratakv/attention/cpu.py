"""Attention over pages by the C++ kernels: nothing is gathered, every byte of K and V is read where it lies."""

from __future__ import annotations

import importlib
import os
from array import array
from typing import Any

import torch
from torch import Tensor

from stratakv.attention.base import AttentionBackend, AttentionOptions, check_call, hidden_below, query_heads
from stratakv.blocks.view import KVPart, KVView
from stratakv.codecs.floats import FORMAT_OF_DTYPE
from stratakv.errors import ConfigurationError, InvariantError, UnsupportedError
from stratakv.plan import ReadPlan

try:  # by its name, so that the package's root, which knows all parts, is not imported here
    _kernels: Any = importlib.import_module("stratakv._kernels")
except ImportError:  # installed without the extension
    _kernels = None

_Step = tuple[Any, tuple[object, ...]]
"""A call of a kernel, and what it has the addresses of."""

NUMBER_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORMATS = {FORMAT_OF_DTYPE[dtype]: number for dtype, number in NUMBER_TYPES.items()}
MASK_BOOL, MASK_FLOAT, MASK_BIAS = 1, 2, 3
MOST_POSITIONS = 2**31 - 1
PREFILL_QUERIES = 24
"""With so many queries a KV head (new tokens times query heads) the kernel for prompts is the faster one: measured with
head dims 64 and 128, fp32 and bf16 pages, 512 to 4096 rows. It gives a thread no less than that."""


def is_built() -> bool:
    """Whether the extension was compiled and could be loaded."""
    return _kernels is not None


def instruction_sets() -> tuple[str, ...]:
    """What this processor can run, best first."""
    return tuple(_kernels.supported_isas()) if _kernels is not None else ()


def load_kernels(isa: str | None = None) -> tuple[Any, str]:
    """The extension, and the instruction set to use: `isa`, or what STRATAKV_ISA names, or the best there is.

    Raises:
        UnsupportedError: the extension is not there. ConfigurationError: this processor has no such instruction set.
    """
    if _kernels is None:
        raise UnsupportedError("the extension stratakv._kernels was not built; install a C++ compiler and reinstall")
    chosen = isa or os.environ.get("STRATAKV_ISA")
    if not chosen:
        return _kernels, instruction_sets()[0]
    if not _kernels.is_supported(chosen):  # asking for all of them would enlarge the process's signal frames, for AMX
        raise ConfigurationError(f"the instruction set {chosen!r} is not one of {', '.join(instruction_sets())}")
    return _kernels, chosen


def read_all(words: Tensor) -> int:
    """The sum of all of `words`, int64 `[n]` in RAM, by as many threads as attention takes: a measure of bandwidth.

    Without the extension torch reads them.
    """
    if _kernels is None:
        return int(words.sum())
    return int(_kernels.read_all(words.data_ptr(), words.numel(), torch.get_num_threads()))


class CpuBackend(AttentionBackend):
    """Attention over float pages in RAM, with a kernel for few queries and one for many.

    Args:
        isa: one of `instruction_sets()`; None: what the environment variable STRATAKV_ISA names, or the best.

    Raises:
        UnsupportedError: the extension is not there. ConfigurationError: this processor has no `isa`.
    """

    name = "cpu"

    def __init__(self, isa: str | None = None) -> None:
        self._kernels, self.isa = load_kernels(isa)
        self._last: tuple[ReadPlan, tuple[object, ...], _Step] | None = None

    def supports(self, view: KVView, options: AttentionOptions, dtype: torch.dtype) -> str | None:
        """Float pages in RAM."""
        del options
        if dtype not in NUMBER_TYPES:
            return f"queries are {dtype}"
        for part in view.parts:
            arena = part.arena
            if arena.device.type != "cpu":
                return f"pages are on {arena.device}"
            if arena.k_codec.name not in FORMATS or arena.v_codec.name not in FORMATS:
                return f"pages are stored as {arena.k_codec.name} and {arena.v_codec.name}"
        return None

    def run(self, query: Tensor, view: KVView, options: AttentionOptions) -> tuple[Tensor, Tensor]:
        """Attend part by part: the heads of a part hold the same rows."""
        check_call(query, view, options)
        if reason := self.supports(view, options, query.dtype):
            raise ConfigurationError(f"the kernels do not serve this call: {reason}")
        n_sequences, n_query_heads, n_new, _ = query.shape
        query = query.resolve_neg()
        query = query if query.stride(3) == 1 else query.contiguous()
        group = n_query_heads // view.n_kv_heads
        out = query.new_empty((n_sequences, n_new, n_query_heads, view.v_dim)).transpose(1, 2)
        lse = query.new_empty((n_sequences, n_query_heads, n_new), dtype=torch.float32)
        table, kind = _added(options)
        for part in view.parts:
            if part.heads == tuple(range(view.n_kv_heads)):
                self._run_part(query, part, view, options, table, kind, group, out, lse)
                continue
            heads = query_heads(part, group)
            shape = (n_sequences, n_new, len(heads), view.v_dim)
            own = query.new_empty(shape).transpose(1, 2), lse.new_empty(shape[0], shape[2], shape[1])
            chosen = table if table is None or table.shape[1] == 1 else table[:, heads]
            self._run_part(query[:, heads], part, view, options, chosen, kind, group, *own, heads=heads)
            out[:, heads], lse[:, heads] = own
        return out, lse

    def _run_part(
        self,
        query: Tensor,
        part: KVPart,
        view: KVView,
        options: AttentionOptions,
        table: Tensor | None,
        kind: int,
        group: int,
        out: Tensor,
        lse: Tensor,
        heads: Tensor | None = None,
    ) -> None:
        part.arena.check_version(part.plan)
        # What the kernel has the addresses of is held until it returns: other threads run meanwhile.
        if table is None and options.sinks is None:
            step, _held = self._plain_step(part, view, options, group, query.dtype)
        else:
            sinks = options.sinks if options.sinks is None or heads is None else options.sinks[heads]
            sinks = None if sinks is None else sinks.float().resolve_neg().contiguous()
            step, _held = self._make_step(part, view, options, group, query.dtype, sinks)
            _set_mask(step, table, kind, options.mask_offset)
        addresses, _slabs = part.arena.addresses(part.member)
        step.run(
            addresses.data_ptr(),
            query.data_ptr(),
            query.stride()[:3],
            out.data_ptr(),
            out.stride()[:3],
            lse.data_ptr(),
        )

    def _plain_step(
        self, part: KVPart, view: KVView, options: AttentionOptions, group: int, dtype: torch.dtype
    ) -> _Step:
        """A call without mask or sinks: the one of the layer before, where it was the same but for its memory."""
        member = part.arena.spec.members[part.member]
        facts = (
            *(member.heads, member.k_layout, member.v_layout, part.retention),
            *(options.scale, options.softcap, options.causal, view.seen_tokens, view.n_new),
            *(group, dtype, torch.get_num_threads()),
        )
        last = self._last  # a tuple that nobody changes, so that threads may share it
        if last is None or last[0] is not part.plan or last[1] != facts:
            last = part.plan, facts, self._make_step(part, view, options, group, dtype)
            self._last = last
        return last[2]

    def _make_step(
        self,
        part: KVPart,
        view: KVView,
        options: AttentionOptions,
        group: int,
        dtype: torch.dtype,
        sinks: Tensor | None = None,
    ) -> _Step:
        """A call, but for where its numbers lie and its mask."""
        step, plan, arena = self._kernels.Step(self.isa), part.plan, part.arena
        member = arena.spec.members[part.member]
        table, positions = plan.table, None if plan.is_one_run else plan.row_positions
        first = (plan.runs[0][0] if plan.runs else 0) - plan.skip
        retention = part.retention
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
        step.set_queries(group, view.n_new, NUMBER_TYPES[dtype], torch.get_num_threads(), PREFILL_QUERIES)
        return step, (table, positions, sinks, *each)


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


def _set_mask(step: Any, table: Tensor | None, kind: int, offset: int) -> None:
    if table is None:
        step.set_mask(0, 0, 0, 0, 0, 0)
        return
    if table.dtype != (torch.bool if kind == MASK_BOOL else torch.float32):
        raise InvariantError(f"a mask of kind {kind} came to the kernels as {table.dtype}")
    strides = [stride if size > 1 else 0 for stride, size in zip(table.stride()[:3], table.shape[:3], strict=True)]
    step.set_mask(table.data_ptr(), *strides, kind, offset)
