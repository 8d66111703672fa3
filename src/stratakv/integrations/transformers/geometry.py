"""From a transformers config to the layers of a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stratakv.errors import UnsupportedError
from stratakv.integrations.transformers.arguments import check_model
from stratakv.integrations.transformers.compat import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    PreTrainedModel,
    default_layers,
    recurrent_layer_types,
    takes_cache_argument,
)
from stratakv.integrations.transformers.recurrent import has_states
from stratakv.spec import LayerSpec


def decoder_config(config: Any) -> Any:
    """The part of a config that describes the decoder."""
    return config.get_text_config(decoder=True)


def attention_config(model: Any) -> Any:
    """The config that the decoder's attention layers look up their function in.

    An encoder-decoder's own: `get_text_config` makes a copy of it, which would go on naming the old function.
    """
    is_encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    return model.config if is_encoder_decoder else decoder_config(model.config)


def max_positions(model: Any) -> int | None:
    """Positions that `model` was made for, or None where its config names no limit."""
    found = getattr(decoder_config(model.config), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def attention_window(layer: Any) -> int | None:
    """The window of one of transformers' own attention layers."""
    return layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None


def template_layers(config: Any) -> list[Any]:
    """What transformers' own cache would hold for a decoder of `config`, layer by layer.

    Raises:
        UnsupportedError: a layer stores something that pages do not.
    """
    if unknown := recurrent_layer_types(decoder_config(config)):
        raise UnsupportedError(
            f"layers of type {', '.join(unknown)} need a cache of the model's own in this version of transformers; "
            "version 5.4 and newer keep their states in layers that StrataKV can hold"
        )
    layers = default_layers(config)
    for layer in layers:
        is_rows = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        is_mixed = has_states(layer) and isinstance(layer, DynamicLayer)
        is_other = has_states(layer) or (DummyLayer is not None and isinstance(layer, DummyLayer))
        if not (is_rows or is_mixed or is_other):
            raise UnsupportedError(
                f"{type(layer).__name__} stores more than keys and values (an indexer or compressed rows), "
                "which pages do not hold"
            )
    return layers


def servable_layers(model: Any) -> list[Any]:
    """`template_layers` of a model that can use our cache at all.

    Raises:
        UnsupportedError: it cannot, with the reason. ConfigurationError: it is no model.
    """
    check_model(model)
    name = type(model).__name__
    takes_cache = getattr(type(model), "_supports_default_dynamic_cache", None)
    if takes_cache is not None and not takes_cache():
        raise UnsupportedError(f"{name} accepts only a cache class of its own")
    if isinstance(model, PreTrainedModel) and not takes_cache_argument(model):
        raise UnsupportedError(f"the forward of {name} takes no cache")
    layers = template_layers(model.config)
    if not any(isinstance(layer, DynamicLayer) for layer in layers):
        raise UnsupportedError(f"{name} has no attention layers that cache keys and values")
    return layers


def layer_specs(config: Any, layers: Sequence[Any]) -> list[LayerSpec]:
    """Heads and head dims of each layer with rows, as far as the config tells; the first rows show the rest."""
    whole = decoder_config(config)
    by_layer = getattr(whole, "per_layer_config", None) or [whole] * len(layers)  # heads differ by layer in some models
    specs = []
    for index, layer in enumerate(layers):
        if isinstance(layer, DynamicLayer):
            decoder = by_layer[index]
            n_heads = _number(decoder, index, "num_key_value_heads", "num_kv_heads", "num_attention_heads", default=1)
            hidden = _number(decoder, index, "hidden_size", default=0)
            n_query_heads = _number(decoder, index, "num_attention_heads", default=n_heads)
            head_dim = _number(decoder, index, "head_dim", default=max(hidden // n_query_heads, 1))
            specs.append(LayerSpec(index, n_heads, head_dim, head_dim, attention_window(layer)))
    return specs


def _number(config: Any, layer: int, *names: str, default: int) -> int:
    """The first of `names` that the config has as a positive number, or as a list of them with one for each layer."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and layer < len(value):
            value = value[layer]
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return default
