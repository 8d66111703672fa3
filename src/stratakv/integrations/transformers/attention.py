"""Our attention and mask functions, as transformers calls them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stratakv.attention import AttentionOptions, backend_for
from stratakv.attention.reference import attend_tensors
from stratakv.blocks.view import KVView
from stratakv.errors import UnsupportedError
from stratakv.integrations.transformers.compat import (
    ALL_ATTENTION_FUNCTIONS,
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionInterface,
    AttentionMaskInterface,
)
from stratakv.integrations.transformers.gradients import without_gradients
from stratakv.integrations.transformers.state import ATTENTION_NAME
from stratakv.integrations.transformers.tickets import Ticket, redeem


def register() -> None:
    """Make our functions known to transformers. May be called any number of times.

    The mask function is sdpa's: a boolean table, or None where the causal rule alone holds. A name that is registered
    without a mask function would get no mask at all, and padded batches would be silently wrong.
    """
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend over the view that `key` and `value` are tickets for; over plain tensors, as the model would have.

    Args:
        module: the attention layer.
        query: `[batch, n_heads, n_new, head_dim]`.
        key: a ticket, or `[batch, n_kv_heads, n_rows, head_dim]`.
        value: the other ticket, or `[batch, n_kv_heads, n_rows, v_dim]`.
        attention_mask: bool or additive `[batch, 1 or n_heads, n_new, n_columns]`, or None.
        dropout: probability of dropping a weight.
        scaling: factor on the dot products; None: 1 / sqrt(head_dim).
        is_causal: whether None as mask means causal; None: as the layer says.
        kwargs: `softcap`, `s_aux` (sinks) and `position_bias` are honoured; the rest is for other functions.

    Returns:
        `[batch, n_new, n_heads, v_dim]`, and None for the weights, which are not kept.
    """
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    ticket = redeem(key, value)
    options = AttentionOptions(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=causal,
        mask=attention_mask,
        mask_offset=0 if ticket is None else _mask_offset(ticket, key.shape[2], attention_mask),
        bias=kwargs.get("position_bias"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    if ticket is not None:
        if dropout:
            raise UnsupportedError("attention dropout is for training; call model.eval() before using a cache")
        _check_sinks(ticket.view, options)
        out, _ = backend_for(ticket.view, options, query.dtype).run(query, ticket.view, options)
        if query.requires_grad:
            out = without_gradients(out.detach(), "attention over stored keys and values", query)
    elif dropout == 0 and (options.softcap is not None or options.sinks is not None):
        # sdpa has neither; without a mask, and with several queries, it takes causal from the layer as we do.
        out = attend_tensors(query, key, value, options)
    else:
        passed = {**kwargs, "dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        attended: Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **passed)[0]
        return attended, None
    return out.transpose(1, 2).contiguous(), None


def _mask_offset(ticket: Ticket, n_columns: int, mask: Tensor | None) -> int:
    """The position of the mask's first column. A mask of another width than was announced begins at position 0."""
    view = ticket.view
    n_seen = view.seen_tokens + view.n_new
    if mask is None or mask.shape[-1] == n_columns:
        return ticket.mask_offset
    if mask.shape[-1] == n_seen:
        return 0
    raise UnsupportedError(
        f"layer {view.layer} was given a mask of {mask.shape[-1]} columns, where {n_columns} or {n_seen} are right"
    )


def _check_sinks(view: KVView, options: AttentionOptions) -> None:
    """Refuse sinks that padding hides: a padded sequence would not be what it is without padding."""
    n_sinks = max((part.retention.sinks for part in view.parts if part.retention is not None), default=0)
    if not n_sinks or options.mask is None or options.mask_offset:
        return
    shown = options.mask[..., -1, : min(n_sinks, options.mask.shape[-1])]  # of the last query
    if not bool((shown if shown.dtype == torch.bool else shown >= 0).all()):
        raise UnsupportedError("a policy with sinks keeps a sequence's first tokens, which here are padding; pad right")
