"""Attention over pages by the C++ kernels: nothing is gathered, every byte of K and V is read where it lies."""

from __future__ import annotations

import importlib
import os
from array import array
from typing import Any

import torch
from torch import Tensor

from stratakv.attention.base import AttentionBackend, AttentionOptions, check_call
from stratakv.blocks.view import KVPart, KVView
from stratakv.errors import ConfigurationError, UnsupportedError

try:  # by its name, so that the package's root, which knows all parts, is not imported here
    _kernels: Any = importlib.import_module("stratakv._kernels")
except ImportError:  # installed without the extension
    _kernels = None

NUMBER_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORMATS = {"fp32": 0, "bf16": 1, "fp16": 2}
MASK_BOOL, MASK_FLOAT, MASK_BIAS = 1, 2, 3
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
    available = instruction_sets()
    chosen = isa or os.environ.get("STRATAKV_ISA") or available[0]
    if chosen not in available:
        raise ConfigurationError(f"the instruction set {chosen!r} is not one of {', '.join(available)}")
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
        query = query if query.stride(3) == 1 else query.contiguous()
        group = n_query_heads // view.n_kv_heads
        out = query.new_empty((n_sequences, n_new, n_query_heads, view.v_dim)).transpose(1, 2)
        lse = query.new_empty((n_sequences, n_query_heads, n_new), dtype=torch.float32)
        table, kind = _added(options)
        for part in view.parts:
            if part.heads == tuple(range(view.n_kv_heads)):
                self._run_part(query, part, view, options, table, kind, group, out, lse)
                continue
            heads = torch.tensor([head * group + g for head in part.heads for g in range(group)], device="cpu")
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
        step, plan, arena = self._kernels.Step(self.isa), part.plan, part.arena
        arena.check_version(plan)
        member = arena.spec.members[part.member]
        positions = None if plan.is_one_run else plan.row_positions
        first = (plan.runs[0][0] if plan.runs else 0) - plan.skip
        retention = part.retention
        sinks = options.sinks if options.sinks is None or heads is None else options.sinks[heads]
        sinks = None if sinks is None else sinks.float().contiguous()
        step.set_pages(
            plan.table.data_ptr(), plan.table.stride(0), plan.n_sequences, len(member.heads), plan.block_tokens
        )
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
            0 if retention is None or retention.window is None else retention.window,
            0 if retention is None else retention.sinks,
            0,
            0 if sinks is None else sinks.data_ptr(),
        )
        n_new = query.shape[2]
        each = [
            array("i", [x]) * plan.n_sequences for x in (plan.skip + plan.n_rows, plan.skip, first, view.seen_tokens)
        ]
        counts, skips, firsts, queries = (numbers.buffer_info()[0] for numbers in each)
        step.set_rows(counts, skips, firsts, 0 if positions is None else positions.data_ptr(), queries)
        step.set_queries(group, n_new, NUMBER_TYPES[query.dtype], torch.get_num_threads(), PREFILL_QUERIES)
        _set_mask(step, table, kind, options.mask_offset)
        step.run(
            arena.addresses(part.member).data_ptr(),
            query.data_ptr(),
            _strides(query),
            out.data_ptr(),
            _strides(out),
            lse.data_ptr(),
        )


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


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
    hiding = torch.where(mask[..., :n], 0.0, -torch.inf) if mask.dtype == torch.bool else _hiding(mask[..., :n])
    return _dense(bias[..., :n].float() + hiding), MASK_BIAS


def _hiding(mask: Tensor) -> Tensor:
    """A float mask in fp32 that has -inf where it hides."""
    return mask.float().masked_fill(mask < torch.finfo(mask.dtype).min / 4, -torch.inf)


def _dense(table: Tensor) -> Tensor:
    return table if table.stride(3) == 1 or table.shape[3] == 1 else table.contiguous()


def _set_mask(step: Any, table: Tensor | None, kind: int, offset: int) -> None:
    if table is None:
        step.set_mask(0, 0, 0, 0, 0, 0)
        return
    strides = [stride if size > 1 else 0 for stride, size in zip(table.stride()[:3], table.shape[:3], strict=True)]
    step.set_mask(table.data_ptr(), *strides, kind, offset)
