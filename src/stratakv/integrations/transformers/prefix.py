"""What a cache and a prompt have in common. Verbs of `KVCache`, which documents them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stratakv.errors import ConfigurationError, StateError
from stratakv.integrations.transformers.arguments import whole_numbers

if TYPE_CHECKING:
    from stratakv.integrations.transformers.cache import KVCache


def match_prefix(cache: KVCache, token_ids: Any) -> int:
    """Cut `cache` to what it shares with a prompt; see `KVCache.match_prefix`."""
    prompt = whole_numbers("token_ids", token_ids)
    if prompt.shape not in ((prompt.numel(),), (1, prompt.numel())) or not prompt.numel():
        raise ConfigurationError(f"token_ids must be one prompt, [n] or [1, n], got {tuple(prompt.shape)}")
    if cache.token_ids is None or len(cache.token_ids) != 1:
        raise StateError("only a cache of one sequence whose token ids are known can be matched with a prompt")
    common = common_prefix(cache.token_ids[0], prompt.flatten().tolist())
    try:
        cache.truncate(common)
    except StateError:  # rows that a shorter run would see have left a window: nothing can be used
        cache.reset()
        return 0
    return common


def common_prefix(held: Sequence[int], wanted: Sequence[int]) -> int:
    """How many first tokens the two share; at least the last one wanted is left to feed."""
    same = next((i for i, (a, b) in enumerate(zip(held, wanted, strict=False)) if a != b), min(len(held), len(wanted)))
    return max(min(same, len(wanted) - 1), 0)
