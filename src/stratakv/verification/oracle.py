"""The run that a cached run is held against: all tokens at once, nothing cached.

For a format that rounds, an oracle with exact K/V would differ by the rounding, and a mask that hides one token too
many could pass for noise. So its K/V are rounded too, and to the very same side: a cached and an uncached forward
differ in the last bits before rounding, and where a number lies in the middle between two stored ones those bits
decide. Of the two, the oracle takes the one that the cache stored, provided that it is one of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stratakv.codecs import Codec, get_codecs
from stratakv.integrations.transformers.compat import DynamicCache
from stratakv.spec import CacheSpec

ROUNDED_ANEW = 1.5
"""How much farther from the exact row a row with another scale may be than the nearest one."""
_Rows = Mapping[int, tuple[Tensor, Tensor]]

MIDPOINT_SLACK = 1e-4
"""How far from the middle between two stored numbers the side is left open, relative to the row's largest number."""


class RoundingCache(DynamicCache):  # type: ignore[misc]  # transformers is untyped
    """For one whole forward: gives every layer its own new K/V back, rounded as a format rounds them.

    Args:
        config: of the model.
        codecs: for K and for V.
        stored: for each layer, the rows K `[batch, n_kv_heads, n_tokens, k_dim]` and V that a cache stored.
    """

    def __init__(self, config: Any, codecs: tuple[Codec, Codec], stored: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__(config=config)
        self._codecs = codecs
        self._stored = stored

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Round, then cache as transformers does; the first forward over an empty cache sees just these."""
        rows = (key_states, value_states)
        keys, values = (
            snapped(exact, codec.rounded(exact), stored, whole_rows=_is_scaled(codec))
            for exact, codec, stored in zip(rows, self._codecs, self._stored[layer_idx], strict=True)
        )
        updated: tuple[Tensor, Tensor] = super().update(keys, values, layer_idx, *args, **kwargs)
        return updated


class ResidualCache(DynamicCache):  # type: ignore[misc]  # transformers is untyped
    """For the same steps as the cache took: gives a layer all rows, the old ones rounded as a format rounds them.

    The rows of a step, the last ones before it and the first ones are rounded to 16 bits instead. Which ones those are
    depends on the number of tokens before the step alone.

    Args:
        config: of the model.
        spec: of the cache. Its groups say how many rows are held in 16 bits.
        stored: for each layer, all rows K `[batch, n_kv_heads, n_tokens, k_dim]` and V, as a cache stored them in 16
            bits.
        coded: likewise, as it stored them in its formats.
    """

    def __init__(self, config: Any, spec: CacheSpec, stored: _Rows, coded: _Rows) -> None:
        super().__init__(config=config)
        self._spec = spec
        self._stored = stored
        self._coded = coded
        self._exact: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All rows that the step sees, each rounded as the cache would have it."""
        n_seen = super().update(key_states, value_states, layer_idx, *args, **kwargs)[0].shape[2]
        keys, values = self._exact.get(layer_idx, (key_states[:, :, :0], value_states[:, :, :0]))
        before = keys.shape[2]
        self._exact[layer_idx] = torch.cat((keys, key_states), 2), torch.cat((values, value_states), 2)
        mixed = [self._mixed(layer_idx, is_key, before)[:, :, -n_seen:] for is_key in (True, False)]
        return mixed[0], mixed[1]

    def _mixed(self, layer: int, is_key: bool, before: int) -> Tensor:
        """All rows, as the step after `before` tokens reads them."""
        exact, stored, coded = (rows[layer][not is_key] for rows in (self._exact, self._stored, self._coded))
        n = exact.shape[2]
        mixed = torch.empty_like(exact)
        at = torch.arange(n, device=exact.device)
        for g, m in self._spec.locations[layer]:
            group, recent = self._spec.groups[g], self._spec.groups[self._spec.recents[g]]
            few, near = (get_codecs(each.k_format, each.v_format)[not is_key] for each in (group, recent))
            heads = list(group.members[m].heads)
            own = exact[:, heads]
            sixteen = snapped(own, near.rounded(own), stored[:, heads, :n], whole_rows=False)
            grouped = few.group_rows(group.block_tokens) > 1  # then they are held in 16 bits before
            rounded = few.rounded(near.rounded(own) if grouped else own, group.block_tokens)
            rounded = snapped(own, rounded, coded[:, heads, :n], whole_rows=_is_scaled(few))
            last = max(before - (recent.retention.window or 0) + 1, 0) // recent.block_tokens * recent.block_tokens
            is_recent = (at < recent.retention.sinks) | (at >= last)
            mixed[:, heads] = torch.where(is_recent[:, None], sixteen, rounded)
        return mixed


def _is_scaled(codec: Codec) -> bool:
    return codec.layout(64, 1).scale_bytes > 0


def snapped(exact: Tensor, rounded: Tensor, stored: Tensor, *, whole_rows: bool) -> Tensor:
    """`rounded`, but `stored` where that is as near to `exact` as makes no difference. All `[..., head_dim]`.

    Number by number; or, where a row's numbers are rounded together, in whole rows. What rounds a row's scale to the
    other side rounds all of its numbers anew: then the two may be `ROUNDED_ANEW` times as far from `exact`.
    """
    slack = MIDPOINT_SLACK * exact.abs().amax(dim=-1, keepdim=True)
    found, best = stored - exact, rounded - exact
    if whole_rows:
        found, best = found.norm(dim=-1, keepdim=True), ROUNDED_ANEW * best.norm(dim=-1, keepdim=True)
    return torch.where(found.abs() <= best.abs() + slack, stored, rounded)
