"""The interface of an attention backend, and the merge of partial results."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stratakv.blocks.view import KVPart, KVView
from stratakv.errors import ConfigurationError
from stratakv.tensors import described, has_numbers


@dataclass(frozen=True)
class AttentionOptions:
    """How one layer attends.

    Attributes:
        scale: factor on the dot products.
        causal: with no mask, whether a query sees rows at later positions (False) or not (True).
        mask: what a query sees, `[n_sequences or 1, n_query_heads or 1, n_new or 1, n_columns]`: bool (True: sees) or a
            number to add to the scores, which hides where it is as small as its dtype goes. Column c is
            absolute position `mask_offset + c`. None: the causal rule alone.
        mask_offset: the position of the mask's first column.
        bias: number to add to the scores, shaped and indexed as `mask`; None: nothing.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2, arXiv:2408.00118). None: as they are.
        sinks: `[n_query_heads]`, a learned score that takes part in the softmax without a value (gpt-oss). None: none.
    """

    scale: float
    causal: bool = True
    mask: Tensor | None = None
    mask_offset: int = 0
    bias: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ConfigurationError(f"a softcap is a finite number above 0, got {self.softcap}")


_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class AttentionBackend(ABC):
    """Computes attention of new queries over the rows of a view."""

    name: str

    @abstractmethod
    def supports(self, view: KVView, options: AttentionOptions, dtype: torch.dtype) -> str | None:
        """Why this backend cannot serve queries of `dtype` over `view`, or None where it can."""

    @abstractmethod
    def run(self, query: Tensor, view: KVView, options: AttentionOptions) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            query: `[n_sequences, n_query_heads, n_new, k_dim]`; query head h reads KV head
                `h // (n_query_heads / n_kv_heads)`.
            view: the rows.
            options: scale, mask and the rest.

        Returns:
            out `[n_sequences, n_query_heads, n_new, v_dim]` in the query's dtype, and lse
            `[n_sequences, n_query_heads, n_new]`, the logarithm of the sum of exponentiated scores (sinks left out).
            A query that sees no row gets zeros and -inf.
        """


def query_heads(part: KVPart, group: int) -> Tensor:
    """The query heads that attend to the KV heads of `part`, `group` for each of them, in RAM."""
    return torch.tensor([head * group + g for head in part.heads for g in range(group)], device="cpu")


def check_call(query: Tensor, view: KVView, options: AttentionOptions) -> None:
    """Refuse what does not fit together, with ConfigurationError.

    Args:
        query: `[n_sequences, n_query_heads, n_new, k_dim]`, as many new tokens as the view's step has.
        view: the rows.
        options: masks and the rest, on the device of the query.
    """
    if query.dim() != 4 or not query.is_floating_point() or not has_numbers(query):
        raise ConfigurationError(
            f"queries are numbers in memory [n_sequences, n_query_heads, n_new, k_dim], got {described(query)}"
        )
    n_sequences, n_query_heads, n_new, k_dim = query.shape
    if n_query_heads % view.n_kv_heads or k_dim != view.k_dim or n_sequences != view.n_sequences:
        raise ConfigurationError(
            f"queries {tuple(query.shape)} do not fit {view.n_sequences} sequences of {view.n_kv_heads} KV heads "
            f"with keys of {view.k_dim}"
        )
    if n_new != view.n_new:
        raise ConfigurationError(f"the step has {view.n_new} new tokens, the queries {tuple(query.shape)} are {n_new}")
    if options.sinks is not None and options.sinks.shape != (n_query_heads,):
        raise ConfigurationError(f"sinks are [{n_query_heads}], one a query head, got {tuple(options.sinks.shape)}")
    if elsewhere := {part.arena.device for part in view.parts} - {query.device}:
        raise ConfigurationError(f"queries are on {query.device}, pages on {', '.join(map(str, elsewhere))}")
    for name in ("mask", "bias", "sinks"):
        tensor = getattr(options, name)
        if tensor is not None and tensor.device != query.device:
            raise ConfigurationError(f"queries are on {query.device}, the {name} is on {tensor.device}")
        if tensor is not None and not has_numbers(tensor):
            raise ConfigurationError(f"the {name} holds no numbers in memory: {described(tensor)}")
    for table in (options.mask, options.bias):
        if table is not None:
            is_bool = table.dtype == torch.bool and table is options.mask
            if table.layout != torch.strided or not (is_bool or table.dtype in _FLOATS):
                raise ConfigurationError(
                    f"a mask is a dense tensor of bool or floats, a bias of floats; got {table.dtype}, {table.layout}"
                )
            for part in view.parts:
                _check_table(table, options.mask_offset, query, part.runs)


def _check_table(table: Tensor, offset: int, query: Tensor, runs: Sequence[tuple[int, int]]) -> None:
    """Refuse a mask or bias that does not fit the queries or does not cover the rows, with ConfigurationError.

    Args:
        table: `[n_sequences or 1, n_query_heads or 1, n_new or 1, n_columns]`.
        offset: the position of the first column.
        query: `[n_sequences, n_query_heads, n_new, k_dim]`.
        runs: first position and number of rows of each run of a view's part, rising.
    """
    if table.dim() != 4 or any(n not in (1, m) for n, m in zip(table.shape[:3], query.shape[:3], strict=True)):
        raise ConfigurationError(f"the mask {tuple(table.shape)} does not fit queries {tuple(query.shape)}")
    first, end = (runs[0][0], sum(runs[-1])) if runs else (offset, offset)
    if first < offset or end > offset + table.shape[3]:
        raise ConfigurationError(
            f"the mask has {table.shape[3]} columns from position {offset} on, the layer's rows reach from position "
            f"{first} to {end - 1}"
        )


def hidden_below(dtype: torch.dtype) -> float:
    """A number in a mask of `dtype` that is less than this hides.

    Models mark what is hidden with the smallest number there is, or half of it. Kernels take fp64 masks as fp32.
    """
    return torch.finfo(torch.float32 if dtype == torch.float64 else dtype).min / 4


def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join attention over disjoint sets of rows into attention over all of them.

    Each output is weighted with its share of the sum of exponentiated scores (as in FlashInfer's cascade attention,
    Ye et al. 2025, arXiv:2501.01005).

    Args:
        outs: `[..., v_dim]` each.
        lses: `[...]` each.

    Returns:
        out `[..., v_dim]` and lse `[...]`. Where no part saw a row: zeros and -inf.
    """
    stacked = torch.stack(list(lses))  # [n_parts, ...]
    lse = stacked.logsumexp(dim=0)
    weights = torch.where(lse.isneginf(), 0.0, (stacked - lse).exp())
    out = sum(w.unsqueeze(-1) * o.to(w.dtype) for w, o in zip(weights, outs, strict=True))
    assert isinstance(out, Tensor)
    return out.to(outs[0].dtype), lse


def apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Let a learned score per query head take its share of the softmax.

    Args:
        out: `[n_sequences, n_query_heads, n_new, v_dim]`.
        lse: `[n_sequences, n_query_heads, n_new]`.
        sinks: `[n_query_heads]`.
    """
    share = torch.sigmoid(lse - sinks.to(lse.dtype)[None, :, None]).masked_fill(lse.isneginf(), 0.0)
    return (out.to(lse.dtype) * share.unsqueeze(-1)).to(out.dtype)
