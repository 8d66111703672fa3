"""The ways a cache can be used, to run one test over all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from stratakv.blocks.geometry import LAYOUTS
from stratakv.integrations.transformers.attachment import attach
from stratakv.integrations.transformers.cache import KVCache
from stratakv.integrations.transformers.compat import PreTrainedModel

WAYS = ("gathered", "attached")
"""Whether the model's own attention reads plain tensors, or ours reads the pages."""

CAPACITY = 64
BLOCK_TOKENS = 4

__all__ = ["BLOCK_TOKENS", "CAPACITY", "LAYOUTS", "WAYS", "model_for", "small_cache"]


@functools.cache
def model_for(way: str, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The model of `make`, one a process and way: in the way "attached", its attention is ours."""
    model = make()
    if way == "attached":
        attach(model)
    return model


def small_cache(model: PreTrainedModel, layout: str = "paged", **options: Any) -> Any:
    """A cache with blocks of 4 rows that overwrites freed blocks with NaN; `contiguous` holds 64 tokens.

    `options` are further arguments of `KVCache.for_model`.
    """
    if layout == "contiguous":
        options.setdefault("capacity", CAPACITY)
    return KVCache.for_model(model, layout=layout, **{"block_tokens": BLOCK_TOKENS, "poison": True, **options})
