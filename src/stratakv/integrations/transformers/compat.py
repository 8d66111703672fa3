"""All that differs between the accepted versions of transformers (5.0 up to the newest), and nothing else."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface, PreTrainedModel

try:  # since 5.4
    from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer
except ImportError:  # before, models with recurrent layers brought caches of their own
    LinearAttentionCacheLayerMixin = LinearAttentionLayer = None

try:  # since 5.12
    from transformers.cache_utils import DummyLayer
except ImportError:
    DummyLayer = None

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "CacheLayerMixin",
    "DummyLayer",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionCacheLayerMixin",
    "LinearAttentionLayer",
    "PreTrainedModel",
    "cache_keyword",
    "causal_output",
    "default_layers",
    "forward_parameters",
    "positive_crop_keeps",
    "query_length",
    "states_go_through_cache",
    "takes_cache_argument",
]

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])

positive_crop_keeps = VERSION < (5, 15)
"""Whether `crop(k)` with a positive k means "keep k tokens". Since 5.15 it is an error."""

states_go_through_cache = hasattr(Cache, "get_conv_state")
"""Whether models reach recurrent states by verbs of the cache alone, so that it sees each forward that feeds them."""

KV_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


def default_layers(config: Any) -> list[Any]:
    """The layers that transformers' own cache has for a decoder of `config`."""
    return list(DynamicCache(config=config).layers)


def recurrent_layer_types(config: Any) -> list[str]:
    """Layer types that the installed version's own cache would silently take for attention.

    Before 5.4 `DynamicCache` knew attention layers only, and hybrids brought caches of their own.
    """
    if LinearAttentionLayer is not None:
        return []
    return sorted(set(getattr(config, "layer_types", None) or ()) - KV_LAYER_TYPES)


def query_length(argument: int | torch.Tensor) -> int:
    """The number of queries from what `get_mask_sizes` was given: their positions before 5.4, their number since."""
    return argument.shape[0] if isinstance(argument, torch.Tensor) else argument


CACHE_KEYWORDS = ("cache", "past_key_values", "cache_params")


def cache_keyword(model: PreTrainedModel) -> str:
    """The keyword under which the forward takes a cache: `cache` in newer versions, `past_key_values` before."""
    names = forward_parameters(model)
    return next((name for name in CACHE_KEYWORDS if name in names), "past_key_values")


def takes_cache_argument(model: PreTrainedModel) -> bool:
    """Whether the forward names a cache among its arguments. Some swallow any in `**kwargs`, and ignore it."""
    return bool(forward_parameters(model) & set(CACHE_KEYWORDS))


def causal_output(logits: torch.Tensor, cache: Cache) -> CausalLMOutputWithPast:
    """What the forward of a decoder with a head gives: the cache stands in it under the name of the version."""
    name = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
    return CausalLMOutputWithPast(logits=logits, **{name: cache})


def forward_parameters(model: PreTrainedModel) -> frozenset[str]:
    """Names of the arguments that the model's forward takes."""
    return frozenset(inspect.signature(inspect.unwrap(type(model).forward)).parameters)
