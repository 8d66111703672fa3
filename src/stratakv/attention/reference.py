"""Attention in plain torch: any dtype, any block size, unequal heads. The oracle for all other backends."""

from __future__ import annotations

import torch
from torch import Tensor

from stratakv.attention.base import (
    AttentionBackend,
    AttentionOptions,
    apply_sinks,
    check_call,
    hidden_below,
    query_heads,
)
from stratakv.blocks.view import KVPart, KVView
from stratakv.spec import Retention

SCORE_BYTES = 64 << 20
"""Queries are taken in portions whose scores fit into this many bytes."""


class ReferenceBackend(AttentionBackend):
    """Computes in fp32 (fp64 for fp64 queries) whatever the rows are stored in."""

    name = "reference"

    def supports(self, view: KVView, options: AttentionOptions, dtype: torch.dtype) -> str | None:
        """Everything."""
        del view, options, dtype
        return None

    def run(self, query: Tensor, view: KVView, options: AttentionOptions) -> tuple[Tensor, Tensor]:
        """Attend part by part: the heads of a part hold the same rows."""
        check_call(query, view, options)
        with torch.autocast(query.device.type, enabled=False):  # sums stay in fp32
            return self._run(query, view, options)

    def _run(self, query: Tensor, view: KVView, options: AttentionOptions) -> tuple[Tensor, Tensor]:
        n_sequences, n_query_heads, n_new, _ = query.shape
        group = n_query_heads // view.n_kv_heads
        compute = torch.float64 if query.dtype == torch.float64 else torch.float32
        out = query.new_empty((n_sequences, n_query_heads, n_new, view.v_dim))
        lse = torch.empty((n_sequences, n_query_heads, n_new), dtype=compute, device=query.device)
        for part in view.parts:
            heads = query_heads(part, group)
            keys, values = part.read(compute)
            for chosen, seen in _portions(n_new, n_sequences * len(heads) * part.n_rows, view, query.device):
                scores_mask = _Columns(part, options, heads, chosen, seen)
                o, s = _attend(query[:, heads, chosen].to(compute), keys, values, scores_mask, options)
                out[:, heads, chosen], lse[:, heads, chosen] = o.to(query.dtype), s
        return (apply_sinks(out, lse, options.sinks) if options.sinks is not None else out), lse


def attend_tensors(query: Tensor, keys: Tensor, values: Tensor, options: AttentionOptions) -> Tensor:
    """The same attention over plain tensors, for layers whose K/V are in no cache.

    Args:
        query: `[n_sequences, n_query_heads, n_new, k_dim]`.
        keys: `[n_sequences, n_kv_heads, n_rows, k_dim]`; the last query stands at the last row.
        values: `[n_sequences, n_kv_heads, n_rows, v_dim]`.
        options: as for a view; the mask's columns are the rows.

    Returns:
        `[n_sequences, n_query_heads, n_new, v_dim]`.
    """
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    n_new, n_rows = query.shape[2], keys.shape[2]
    positions = torch.arange(n_rows, device=query.device)
    see = None
    if options.mask is None and options.causal:
        see = positions[None, :] <= (torch.arange(n_new, device=query.device) + n_rows - n_new)[:, None]
    out, lse = _softmax_values(
        query.to(compute), keys.to(compute), values.to(compute), options, see, options.mask, options.bias
    )
    out = out.to(query.dtype)
    return apply_sinks(out, lse, options.sinks) if options.sinks is not None else out


class _Columns:
    """What some queries see of one part's rows."""

    def __init__(
        self, part: KVPart, options: AttentionOptions, heads: Tensor, chosen: slice, query_positions: Tensor
    ) -> None:
        rows = part.positions().to(query_positions.device)
        self.see: Tensor | None = None  # bool [n_queries, n_rows]
        if options.mask is None and options.causal:
            self.see = rows[None, :] <= query_positions[:, None]
        if part.retention is not None:
            seen = _retained(part.retention, query_positions, rows)
            self.see = seen if self.see is None else self.see & seen
        self.mask = _aligned(options.mask, part, options.mask_offset, rows, heads, chosen)
        self.bias = _aligned(options.bias, part, options.mask_offset, rows, heads, chosen)


def _portions(n_new: int, score_rows: int, view: KVView, device: torch.device) -> list[tuple[slice, Tensor]]:
    """Slices of the queries, each with the queries' absolute positions."""
    step = max(1, SCORE_BYTES // max(4 * score_rows, 1))
    positions = torch.arange(view.seen_tokens, view.seen_tokens + n_new, device=device)
    return [(slice(i, min(i + step, n_new)), positions[i : i + step]) for i in range(0, n_new, step)]


def _retained(retention: Retention, query_positions: Tensor, rows: Tensor) -> Tensor:
    """bool `[n_queries, n_rows]`: whether the row is in the query's window or a sink."""
    if retention.window is None:
        return torch.ones((len(query_positions), len(rows)), dtype=torch.bool, device=rows.device)
    near = rows[None, :] > query_positions[:, None] - retention.window
    return near | (rows[None, :] < retention.sinks)


def _aligned(
    table: Tensor | None, part: KVPart, offset: int, rows: Tensor, heads: Tensor, chosen: slice
) -> Tensor | None:
    """The entries of a mask or bias for these rows, query heads and queries."""
    if table is None:
        return None
    first = int(rows[0]) - offset if len(rows) else 0
    columns = table[..., first : first + len(rows)] if len(part.runs) <= 1 else table[..., rows - offset]
    columns = columns[:, heads] if columns.shape[1] > 1 else columns
    return columns[:, :, chosen] if columns.shape[2] > 1 else columns


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, columns: _Columns, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    return _softmax_values(query, keys, values, options, columns.see, columns.mask, columns.bias)


def _softmax_values(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    options: AttentionOptions,
    see: Tensor | None,
    mask: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out `[n_sequences, n_query_heads, n_queries, v_dim]` and lse `[n_sequences, n_query_heads, n_queries]`."""
    n_sequences, n_query_heads, n_queries, _ = query.shape
    n_kv_heads, n_rows = keys.shape[1], keys.shape[2]
    grouped = query.reshape(n_sequences, n_kv_heads, -1, query.shape[-1])  # the queries of a KV head side by side
    scores = (grouped @ keys.transpose(2, 3)).view(n_sequences, n_query_heads, n_queries, n_rows) * options.scale
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        # A model's own float masks mark what is hidden with the smallest number there is, or half of it.
        scores = (scores + mask.to(scores.dtype)).masked_fill(mask < hidden_below(mask.dtype), -torch.inf)
    if see is not None:
        scores = scores.masked_fill(~see, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    weights = torch.where(lse.isneginf().unsqueeze(-1), 0.0, scores.softmax(dim=-1))
    out = weights.view(n_sequences, n_kv_heads, -1, n_rows) @ values
    return out.view(n_sequences, n_query_heads, n_queries, values.shape[-1]), lse
