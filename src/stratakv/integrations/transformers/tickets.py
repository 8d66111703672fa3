"""How a step's view travels from `update` to our attention function through a model that knows neither.

`update` must return two tensors, and models hand them on as `key` and `value`. A ticket is a tensor of the right shape
that holds NaN in a single number (stride 0) and carries the view as an attribute. An attribute stays with the very
object: whatever the model does to keys or values in between makes a new tensor without it, full of NaN. So a model
that changes K or V after `update` gives NaN, never a plausible result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stratakv.blocks.view import KVView
from stratakv.errors import StateError

_ATTRIBUTE = "_stratakv_ticket"


class Epoch:
    """Counts the steps of one cache. A ticket is good in the epoch it was issued in."""

    def __init__(self) -> None:
        self.number = 0

    def advance(self) -> None:
        """End the life of all tickets issued so far."""
        self.number += 1


@dataclass(frozen=True, slots=True)
class Ticket:
    """A view, where the mask for it starts, and the step it belongs to."""

    view: KVView
    mask_offset: int
    epoch: Epoch
    number: int


def issue(view: KVView, n_columns: int, mask_offset: int, epoch: Epoch, like: Tensor) -> tuple[Tensor, Tensor]:
    """Tickets for keys `[n_sequences, n_kv_heads, n_columns, k_dim]` and values `[..., v_dim]`."""
    ticket = Ticket(view, mask_offset, epoch, epoch.number)
    nan = torch.full((), torch.nan, dtype=like.dtype, device=like.device)
    pair = []
    for role, dim in (("key", view.k_dim), ("value", view.v_dim)):
        tensor = nan.expand(view.n_sequences, view.n_kv_heads, n_columns, dim)
        setattr(tensor, _ATTRIBUTE, (role, ticket))
        pair.append(tensor)
    return pair[0], pair[1]


def redeem(key: Tensor, value: Tensor) -> Ticket | None:
    """The ticket that `key` and `value` are the two halves of, or None where either is another tensor.

    Raises:
        StateError: the ticket is from an earlier step, so its rows may be gone.
    """
    key_role, key_ticket = getattr(key, _ATTRIBUTE, ("", None))
    value_role, value_ticket = getattr(value, _ATTRIBUTE, ("", None))
    if key_ticket is None or key_ticket is not value_ticket or (key_role, value_role) != ("key", "value"):
        return None
    assert isinstance(key_ticket, Ticket)
    if key_ticket.epoch.number != key_ticket.number:
        raise StateError("keys and values of an earlier step were given to attention; a view is good for one step")
    return key_ticket
