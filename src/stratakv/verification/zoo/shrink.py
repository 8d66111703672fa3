"""Make a tiny config out of the default one and its sub-configs, by rules that name no architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PretrainedConfig

from stratakv.verification.zoo.architectures import declared_defaults
from stratakv.verification.zoo.sizes import HEADS, HIDDEN, TOWER_LAYERS, VOCABULARY, Scale, tiny_integer

# No tiny model is deeper; enough for one period of every hybrid of transformers 5.24.
MOST_LAYERS = 10

_HIDDEN_NAMES = ("hidden_size", "d_model", "n_embd", "emb_dim", "embed_dim", "embedding_dim", "dim", "hidden_dim")
_HEAD_NAMES = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "attention_heads")
_LAYER_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
_PERIOD_SUFFIXES = (
    "_period",
    "_offset",
    "_interval",
    "_every_n_layers",
    "_frequency",
    "_pattern",
    "sparse_step",
    "group_size",
)
# Declared None and left None by a few configs whose models then divide by them: set as the others derive them.
_DERIVED_LATE = {"head_dim": HIDDEN // HEADS, "num_key_value_heads": HEADS}
# Fields of every config that say nothing about sizes.
_PASSED_OVER = frozenset({"transformers_version", "architectures", "id2label", "label2id", "dtype", "problem_type"})


@dataclass
class _SpecialIds:
    """Ids outside the tiny vocabulary, renamed to its last ones: the same id always to the same one."""

    renamed: dict[int, int] = field(default_factory=dict)

    def rename(self, token_id: int) -> int:
        if 0 <= token_id < VOCABULARY or token_id < 0:
            return token_id
        return self.renamed.setdefault(token_id, VOCABULARY - 1 - len(self.renamed) % (VOCABULARY // 2))


def tiny_config(default: Any, adjustments: Mapping[str, Any] | None = None) -> Any:
    """A tiny config of the type of ``default``, a config with the default sizes.

    ``adjustments`` are final values, with dots for sub-configs (``{"text_config.num_hidden_layers": 4}``); they win
    over the rules.
    """
    return _shrink(default, dict(adjustments or {}), _SpecialIds())


def _shrink(default: Any, adjustments: Mapping[str, Any], ids: _SpecialIds) -> Any:
    scale = _scale(default, adjustments)
    arguments: dict[str, Any] = {}
    declared = declared_defaults(type(default))
    for name, declared_value in declared.items():
        if name in _PASSED_OVER:
            continue
        value = _read(default, name, declared_value)
        if isinstance(value, PretrainedConfig):
            below = {key.split(".", 1)[1]: v for key, v in adjustments.items() if key.startswith(f"{name}.")}
            arguments[name] = _shrink(value, below, ids)
        elif isinstance(declared_value, str) and not isinstance(value, str):
            arguments[name] = declared_value  # "auto": to be derived again from the tiny sizes
        elif declared_value is not None:
            arguments[name] = _tiny_value(name, value, scale, ids)
        elif value is None and name in _DERIVED_LATE:
            arguments[name] = _DERIVED_LATE[name]
    overrides = _per_layer_overrides(default)
    if overrides:
        arguments["per_layer_config"] = {
            index: _tiny_layer(layer, scale, ids) for index, layer in overrides.items() if index < scale.n_layers
        }
    arguments.update({key: value for key, value in adjustments.items() if "." not in key})
    return type(default)(**arguments)


def _tiny_layer(layer: Mapping[str, Any], scale: Scale, ids: _SpecialIds) -> dict[str, Any]:
    """The fields in which one layer differs; its KV heads are related to its own query heads."""
    own = replace(scale, heads=int(layer.get("num_attention_heads", scale.heads)))
    return {name: _tiny_value(name, value, own, ids) for name, value in layer.items()}


def _tiny_value(name: str, value: Any, scale: Scale, ids: _SpecialIds) -> Any:
    if isinstance(value, bool) or value is None or isinstance(value, str | float):
        return value
    if isinstance(value, int):
        if name.endswith(("token_id", "token_index", "token_ids")):
            return ids.rename(value)
        return tiny_integer(name, value, scale)
    if isinstance(value, list | tuple):
        return type(value)(_tiny_items(name, value, scale, ids))
    if isinstance(value, dict):
        return {key: _tiny_value(str(key), item, scale, ids) for key, item in value.items()}
    return value


def _tiny_items(name: str, items: Sequence[Any], scale: Scale, ids: _SpecialIds) -> list[Any]:
    integers = all(isinstance(item, int) and not isinstance(item, bool) for item in items)
    if integers and name.endswith(("_ids", "_idxs", "_indices", "_indexes", "_layers")) and "token" not in name:
        below = [item for item in items if item < scale.n_layers]
        # A list like no_rope_layers has one flag a layer: it is cut like any other.
        if len(items) != scale.default_layers or items[:3] == [0, 1, 2]:
            return below or list(items[:0])
    if len(items) == scale.default_layers and len(items) > 1:
        items = items[: scale.n_layers]
    return [_tiny_value(name, item, scale, ids) for item in items]


def _scale(default: Any, adjustments: Mapping[str, Any]) -> Scale:
    default_layers = _first_integer(default, _LAYER_NAMES)
    n_layers = plan_layers(default)
    for name in _LAYER_NAMES:
        n_layers = int(adjustments.get(name, n_layers))
    return Scale(
        hidden=_first_integer(default, _HIDDEN_NAMES),
        heads=_first_integer(default, _HEAD_NAMES),
        n_layers=n_layers,
        default_layers=default_layers,
    )


def plan_layers(default: Any) -> int:
    """The fewest layers, from the first on, among which every kind of layer of ``default`` occurs.

    A kind is what the lists with one entry a layer say (``layer_types``, ``mlp_layer_types``, ...). Where a config
    gives a period or an offset instead, one period is taken.
    """
    default_layers = _first_integer(default, _LAYER_NAMES)
    if default_layers <= TOWER_LAYERS:
        return default_layers
    per_layer = [items for items in _list_attributes(default) if len(items) == default_layers]
    overrides = _per_layer_overrides(default)
    if overrides:
        per_layer.append([repr(sorted(overrides.get(index, {}).items())) for index in range(default_layers)])
    kinds = list(zip(*(map(str, items) for items in per_layer), strict=True))
    needed = 1 + max((kinds.index(kind) for kind in set(kinds)), default=1)
    if needed > MOST_LAYERS:  # e.g. one entry differs in every layer: fall back on the lists of words
        words = [items for items in per_layer if all(isinstance(item, str) for item in items)]
        needed = max((1 + max(items.index(item) for item in set(items)) for items in words), default=TOWER_LAYERS)
    for name, value in vars(default).items():
        if not isinstance(value, int) or isinstance(value, bool) or not name.endswith(_PERIOD_SUFFIXES):
            continue
        if 1 < value <= MOST_LAYERS:
            needed = max(needed, value)
    return min(max(needed, TOWER_LAYERS), MOST_LAYERS, default_layers)


def _read(config: Any, name: str, otherwise: Any) -> Any:
    """The value of a field, also where layers may differ in it and transformers refuses the plain read."""
    mapped = getattr(type(config), "attribute_map", {}).get(name, name)
    if mapped in vars(config):
        return vars(config)[mapped]
    return getattr(config, name, otherwise)


def _per_layer_overrides(config: Any) -> dict[int, dict[str, Any]]:
    """Layer index -> the fields in which that layer differs from the rest (transformers' ``per_layer_config``)."""
    specification = vars(config).get("_heterogeneity_spec")
    return dict(specification.per_layer_overrides) if specification is not None else {}


def _list_attributes(config: Any) -> list[Sequence[Any]]:
    found = [value for value in vars(config).values() if isinstance(value, list | tuple)]
    for name in dir(type(config)):
        if name.startswith("_") or not isinstance(getattr(type(config), name, None), property):
            continue
        value = getattr(config, name, None)
        if isinstance(value, list | tuple):
            found.append(value)
    return [items for items in found if not any(isinstance(item, PretrainedConfig) for item in items)]


def _first_integer(config: Any, names: Sequence[str]) -> int:
    for name in names:
        value = _read(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return 0


__all__ = ["HEADS", "HIDDEN", "MOST_LAYERS", "plan_layers", "tiny_config"]
