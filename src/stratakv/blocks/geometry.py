"""From layers and a format to a CacheSpec: which heads share a block table, and how large their pages are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from stratakv.codecs import Codec, get_codecs
from stratakv.codecs.floats import FloatCodec
from stratakv.errors import ConfigurationError
from stratakv.policies import RetentionPolicy
from stratakv.spec import CacheSpec, GroupSpec, LayerSpec, Member, Retention, aligned
from stratakv.units import whole

LAYOUTS = ("paged", "contiguous", "growing")
INITIAL_GROWING_TOKENS = 64
RECENT_BLOCK_TOKENS = 16
"""Rows in a block of recent rows, at most: up to one block more than the residual is held."""


def build_spec(
    layers: Sequence[LayerSpec],
    *,
    k_format: str,
    v_format: str,
    layout: str = "paged",
    block_tokens: int = 64,
    capacity: int | None = None,
    policy: RetentionPolicy | None = None,
    residual: int | None = None,
    recent_format: str = "bf16",
    comes_once: bool = False,
) -> CacheSpec:
    """Group the heads of `layers` by what their queries see, and lay out their pages.

    A layer with a window of its own keeps it; `policy` decides for all others. Groups with a window are paged under
    every layout, since only pages can be given back when their tokens leave the window.

    Args:
        layers: of the model.
        k_format: how keys are stored.
        v_format: how values are stored.
        layout: one of `LAYOUTS`.
        block_tokens: rows in a block.
        capacity: rows of a sequence, for `contiguous`.
        policy: which rows stay.
        residual: how many of the last rows are held in `recent_format` as well and read from there, with the first
            ones that the formats name. None: as many as the formats ask for.
        recent_format: a format of floats.
        comes_once: all rows of a sequence come in one step, so that none are recent.

    Raises:
        ConfigurationError: an unknown layout or format, what is no policy, or a size out of range.
    """
    if policy is not None and not isinstance(policy, RetentionPolicy):
        raise ConfigurationError(f"policy must be a RetentionPolicy such as Window(512), got {policy!r}")
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
    k_codec, v_codec = get_codecs(k_format, v_format)
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
    together = max(rows_coded_together(group) for group in groups)
    residual = 0 if comes_once else _checked_residual(residual, k_codec, v_codec, together)
    if residual:
        held = Retention(residual, max(k_codec.sinks, v_codec.sinks))
        groups += [_recent_group(g, group, held, recent_format, by_index) for g, group in enumerate(groups)]
    return CacheSpec(tuple(layers), tuple(groups), k_format, v_format, layout, capacity)


def with_layer(spec: CacheSpec, layer: LayerSpec) -> CacheSpec:
    """`spec` with other head dims, or another number of heads, for one layer.

    Raises:
        ConfigurationError: the number of heads changes in a layer whose heads are in different groups.
    """
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
                *get_codecs(group.k_format, group.v_format),
                group.block_tokens,
            )
            for member in group.members
        )
        groups.append(replace(group, members=members))
    layers = tuple(layer if each.index == layer.index else each for each in spec.layers)
    return replace(spec, layers=layers, groups=tuple(groups))


def with_block_tokens(spec: CacheSpec, block_tokens: Sequence[int]) -> CacheSpec:
    """`spec` with `block_tokens[g]` rows in the blocks of group g."""
    groups = tuple(
        group if group.block_tokens == span else _with_span(group, span, spec.layers_by_index)
        for group, span in zip(spec.groups, block_tokens, strict=True)
    )
    return spec if groups == spec.groups else replace(spec, groups=groups)


def _with_span(group: GroupSpec, span: int, layers: Mapping[int, LayerSpec]) -> GroupSpec:
    codecs = get_codecs(group.k_format, group.v_format)
    members = tuple(_member(layers[m.layer], m.heads, *codecs, span) for m in group.members)
    return replace(group, block_tokens=span, members=members)


def rows_coded_together(group: GroupSpec) -> int:
    """How many rows of a group, from a block's first on, are coded together; a block's last ones may be fewer."""
    return max(codec.group_rows(group.block_tokens) for codec in get_codecs(group.k_format, group.v_format))


def _checked_residual(residual: int | None, k_codec: Codec, v_codec: Codec, together: int) -> int:
    """As given, or as the formats ask for; at least as many as the rows that are coded together."""
    if residual is None:
        return max(k_codec.residual, v_codec.residual)
    residual = whole("residual", residual)
    formats = f"{k_codec.name}/{v_codec.name}"
    if residual < 0 or (residual and isinstance(k_codec, FloatCodec) and isinstance(v_codec, FloatCodec)):
        raise ConfigurationError(
            f"residual is how many tokens are held in 16 bits beside fewer bits, got {residual} for {formats}"
        )
    if residual < together > 1:
        raise ConfigurationError(
            f"{formats} codes {together} rows together, which are held in 16 bits until there are as many: residual "
            f"must be at least {together}, got {residual}"
        )
    return residual


def _recent_group(
    index: int, group: GroupSpec, held: Retention, format: str, layers: Mapping[int, LayerSpec]
) -> GroupSpec:
    """The group that holds the last rows of `group`, the `index`-th, in 16 bits, and its first ones."""
    # Its blocks begin where blocks of the group begin, so that the group never lets go of a row that is held here.
    span = math.gcd(group.block_tokens, RECENT_BLOCK_TOKENS)
    seen = group.retention
    if seen.window is not None:
        held = Retention(held.window, aligned(min(held.sinks, seen.sinks), span))  # whole blocks stay
    own = get_codecs(group.k_format, group.v_format)
    formats = (codec.name if isinstance(codec, FloatCodec) else format for codec in own)
    codecs = get_codecs(*formats)
    members = tuple(_member(layers[m.layer], m.heads, *codecs, span) for m in group.members)
    return GroupSpec(f"recent-{group.name}", members, span, held, recent_of=index)


def _member(layer: LayerSpec, heads: tuple[int, ...], k_codec: Codec, v_codec: Codec, block_tokens: int) -> Member:
    k_layout, v_layout = k_codec.layout(layer.k_dim, block_tokens), v_codec.layout(layer.v_dim, block_tokens)
    return Member(layer.index, heads, k_layout, v_layout)


def _name(retention: Retention) -> str:
    sinks = f"+{retention.sinks}" if retention.sinks else ""
    return f"window{retention.window}{sinks}" if retention.window else "full"
