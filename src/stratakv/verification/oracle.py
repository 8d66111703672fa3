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

from stratakv.codecs import Codec
from stratakv.integrations.transformers.compat import DynamicCache

ROUNDED_ANEW = 1.5
"""How much farther from the exact row a row with another scale may be than the nearest one."""
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
            snapped(exact, codec.rounded(exact), stored, whole_rows=codec.layout(exact.shape[-1], 1).scale_bytes > 0)
            for exact, codec, stored in zip(rows, self._codecs, self._stored[layer_idx], strict=True)
        )
        updated: tuple[Tensor, Tensor] = super().update(keys, values, layer_idx, *args, **kwargs)
        return updated


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
