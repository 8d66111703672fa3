"""From layers and a format to a CacheSpec: which heads share a block table, and how large their pages are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stratakv.codecs import Codec, get_codec
from stratakv.errors import ConfigurationError
from stratakv.policies import RetentionPolicy
from stratakv.spec import CacheSpec, GroupSpec, LayerSpec, Member, Retention
from stratakv.units import whole

LAYOUTS = ("paged", "contiguous", "growing")
INITIAL_GROWING_TOKENS = 64


def build_spec(
    layers: Sequence[LayerSpec],
    *,
    k_format: str,
    v_format: str,
    layout: str = "paged",
    block_tokens: int = 64,
    capacity: int | None = None,
    policy: RetentionPolicy | None = None,
) -> CacheSpec:
    """Group the heads of `layers` by what their queries see, and lay out their pages.

    A layer with a window of its own keeps it; `policy` decides for all others. Groups with a window are paged under
    every layout, since only pages can be given back when their tokens leave the window.

    Raises:
        ConfigurationError: an unknown layout or format, or a size out of range.
    """
    if layout not in LAYOUTS:
        raise ConfigurationError(f"unknown layout {layout!r}; accepted are {', '.join(LAYOUTS)}")
    block_tokens = whole("block_tokens", block_tokens)
    capacity = None if capacity is None else whole("capacity", capacity)
    if block_tokens < 1:
        raise ConfigurationError(f"block_tokens must be at least 1, got {block_tokens}")
    if (capacity is None) == (layout == "contiguous") or (capacity is not None and capacity < 1):
        raise ConfigurationError(
            f"layout 'contiguous' takes a capacity of at least 1 token, the others none; got {layout!r}, {capacity}"
        )
    if policy is not None and layout != "paged":
        raise ConfigurationError(f"a policy frees pages, so it needs layout 'paged', not {layout!r}")
    k_codec, v_codec = get_codec(k_format), get_codec(v_format)
    chosen: dict[tuple[Retention, bool], dict[int, list[int]]] = {}
    for layer in layers:
        for head in range(layer.n_kv_heads):
            imposed = layer.window is None and policy is not None
            retention = policy.retention(layer.index, head) if policy and imposed else Retention(layer.window)
            chosen.setdefault((retention, imposed), {}).setdefault(layer.index, []).append(head)
    by_index = {layer.index: layer for layer in layers}
    groups = []
    for (retention, imposed), heads_by_layer in chosen.items():
        span = block_tokens
        if retention.window is None:
            span = {"paged": block_tokens, "contiguous": capacity or 0, "growing": INITIAL_GROWING_TOKENS}[layout]
        members = tuple(
            _member(by_index[index], tuple(heads), k_codec, v_codec, span) for index, heads in heads_by_layer.items()
        )
        groups.append(GroupSpec(_name(retention), members, span, retention, imposed))
    return CacheSpec(tuple(layers), tuple(groups), k_format, v_format, layout, capacity)


def with_layer(spec: CacheSpec, layer: LayerSpec) -> CacheSpec:
    """`spec` with other head dims, or another number of heads, for one layer.

    Raises:
        ConfigurationError: the number of heads changes in a layer whose heads are in different groups.
    """
    codecs = get_codec(spec.k_format), get_codec(spec.v_format)
    old = spec.layers_by_index[layer.index]
    if old.n_kv_heads != layer.n_kv_heads and len(spec.locations[layer.index]) > 1:
        raise ConfigurationError(
            f"layer {layer.index} has {layer.n_kv_heads} KV heads, the policy was given for {old.n_kv_heads}"
        )
    groups = []
    for group in spec.groups:
        members = tuple(
            member
            if member.layer != layer.index
            else _member(
                layer,
                member.heads if old.n_kv_heads == layer.n_kv_heads else tuple(range(layer.n_kv_heads)),
                *codecs,
                group.block_tokens,
            )
            for member in group.members
        )
        groups.append(replace(group, members=members))
    layers = tuple(layer if each.index == layer.index else each for each in spec.layers)
    return replace(spec, layers=layers, groups=tuple(groups))


def with_block_tokens(spec: CacheSpec, block_tokens: Sequence[int]) -> CacheSpec:
    """`spec` with `block_tokens[g]` rows in the blocks of group g."""
    codecs = get_codec(spec.k_format), get_codec(spec.v_format)
    groups = tuple(
        group
        if group.block_tokens == span
        else replace(
            group,
            block_tokens=span,
            members=tuple(_member(spec.layers_by_index[m.layer], m.heads, *codecs, span) for m in group.members),
        )
        for group, span in zip(spec.groups, block_tokens, strict=True)
    )
    return spec if groups == spec.groups else replace(spec, groups=groups)


def _member(layer: LayerSpec, heads: tuple[int, ...], k_codec: Codec, v_codec: Codec, block_tokens: int) -> Member:
    k_layout, v_layout = k_codec.layout(layer.k_dim, block_tokens), v_codec.layout(layer.v_dim, block_tokens)
    return Member(layer.index, heads, k_layout, v_layout)


def _name(retention: Retention) -> str:
    sinks = f"+{retention.sinks}" if retention.sinks else ""
    return f"window{retention.window}{sinks}" if retention.window else "full"
