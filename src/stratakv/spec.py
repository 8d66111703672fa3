"""What a cache looks like, as frozen data: layers, groups and pages. All byte arithmetic is here.

A *page* holds `block_tokens` rows of one KV head, either its keys or its values. A *block* is the set of pages that
one entry of a block table stands for: one page of K and one of V for each (layer, KV head) in its *group*. A group is
a set of (layer, KV head) that share one block table, so all of them hold the same tokens.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from blake3 import blake3

from stratakv.errors import ConfigurationError
from stratakv.units import whole

PAGE_ALIGNMENT = 64
"""Bytes. A cache line, and the width of the widest vector register that the kernels load."""


def aligned(n_bytes: int, alignment: int = PAGE_ALIGNMENT) -> int:
    """`n_bytes` rounded up to a whole number of `alignment` bytes."""
    return -(-n_bytes // alignment) * alignment


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Where the bytes of one page are: `block_tokens` rows of `head_dim` numbers, then the scales, then padding."""

    format: str
    head_dim: int
    block_tokens: int
    payload_bytes: int
    scale_bytes: int = 0
    alignment: int = PAGE_ALIGNMENT

    @property
    def nbytes(self) -> int:
        """Bytes of a page as allocated, padding included."""
        return aligned(self.payload_bytes + self.scale_bytes, self.alignment)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The keys and values that one attention layer of a model caches.

    `window` is the number of keys that a query of this layer may see, itself included, or None where it sees all.
    """

    index: int
    n_kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None = None

    def __post_init__(self) -> None:
        if min(self.n_kv_heads, self.k_dim, self.v_dim) < 1 or self.index < 0:
            raise ConfigurationError(f"a layer needs at least one KV head and head dims of at least 1, got {self}")
        if self.window is not None and self.window < 1:
            raise ConfigurationError(f"a window counts the query's own key, so it is at least 1, got {self.window}")


@dataclass(frozen=True, slots=True)
class Member:
    """Some KV heads of one layer, stored in one group."""

    layer: int
    heads: tuple[int, ...]
    k_layout: PageLayout
    v_layout: PageLayout

    @property
    def nbytes(self) -> int:
        """Bytes that one block holds for this member: all K pages, then all V pages."""
        return len(self.heads) * (self.k_layout.nbytes + self.v_layout.nbytes)


@dataclass(frozen=True, slots=True)
class Retention:
    """Which keys a query may see beside the causal rule: the last `window` (itself included) and the first `sinks`.

    `window` None means all of them.
    """

    window: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", None if self.window is None else whole("a window", self.window))
        object.__setattr__(self, "sinks", whole("sinks", self.sinks))
        if (self.window is not None and self.window < 1) or self.sinks < 0:
            raise ConfigurationError(f"a window is at least 1 and sinks at least 0, got {self}")

    def most_rows(self, n_tokens: int) -> int:
        """How many of `n_tokens` tokens the query at the last of them sees."""
        return n_tokens if self.window is None else min(n_tokens, self.window + self.sinks)


@dataclass(frozen=True)
class GroupSpec:
    """A set of (layer, KV head) with one block table.

    `retention` limits what its queries see. `imposed` tells whose limit that is: False for the model's own sliding
    window, which the model's mask expresses too; True for a policy's, which it does not.

    `recent_of` names the group of the same heads whose last rows this one holds as well, in 16 bits; those are read
    here and not there. Its retention says which rows it holds, not what queries see.
    """

    name: str
    members: tuple[Member, ...]
    block_tokens: int
    retention: Retention = Retention()
    imposed: bool = False
    recent_of: int | None = None

    @property
    def k_format(self) -> str:
        """How keys are stored."""
        return self.members[0].k_layout.format

    @property
    def v_format(self) -> str:
        """How values are stored."""
        return self.members[0].v_layout.format

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """For each member the index of the first one with the same heads and pages: what differs is where they lie."""
        looks = [(member.heads, member.k_layout, member.v_layout) for member in self.members]
        return tuple(looks.index(look) for look in looks)

    @cached_property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all members."""
        return sum(member.nbytes for member in self.members)

    @cached_property
    def bytes_per_token(self) -> int:
        """Bytes of one row over all members, page padding and scales included, rounded up."""
        return -(-self.bytes_per_block // self.block_tokens)

    def blocks_for(self, n_rows: int) -> int:
        """Blocks that `n_rows` rows take."""
        return -(-n_rows // self.block_tokens)


@dataclass(frozen=True)
class CacheSpec:
    """A whole cache: its layers, how their heads are grouped, and how numbers are stored.

    `layout` is `paged`, `contiguous` or `growing`; `capacity` is in tokens a sequence, for `contiguous` only.
    """

    layers: tuple[LayerSpec, ...]
    groups: tuple[GroupSpec, ...]
    k_format: str
    v_format: str
    layout: str
    capacity: int | None = None

    @cached_property
    def layers_by_index(self) -> dict[int, LayerSpec]:
        """Layer specs by the model's own layer index."""
        return {layer.index: layer for layer in self.layers}

    @cached_property
    def locations(self) -> dict[int, tuple[tuple[int, int], ...]]:
        """For each layer index, the (group, member) pairs that together hold all its heads, recent copies left out."""
        found: dict[int, list[tuple[int, int]]] = {layer.index: [] for layer in self.layers}
        for g, group in enumerate(self.groups):
            for m, member in enumerate(group.members):
                if group.recent_of is None:
                    found[member.layer].append((g, m))
        return {index: tuple(pairs) for index, pairs in found.items()}

    @cached_property
    def recents(self) -> dict[int, int]:
        """For each group whose last rows another one holds in 16 bits as well, that other group. Members agree."""
        return {group.recent_of: g for g, group in enumerate(self.groups) if group.recent_of is not None}

    def bytes_per_token(self) -> int:
        """Bytes that one more token takes, page padding and scales included, rounded up.

        Groups with a window count as long as it is not full; copies of recent rows do not, since they are replaced.
        """
        return sum(group.bytes_per_token for group in self.groups if group.recent_of is None)

    def bytes_read(self, n_tokens: int) -> int:
        """Bytes that attention of one query reads of `n_tokens` tokens: of windows only the rows in them."""
        total = 0
        for g, group in enumerate(self.groups):
            n_rows = group.retention.most_rows(n_tokens)
            if g in self.recents:
                n_rows -= self.groups[self.recents[g]].retention.most_rows(n_rows)
            total += group.bytes_per_token * n_rows
        return total

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for files and fingerprints."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CacheSpec:
        """The spec that `to_dict` described.

        Raises:
            ConfigurationError, KeyError, TypeError: the data describes none.
        """
        layers = tuple(LayerSpec(**layer) for layer in data["layers"])
        groups = tuple(
            GroupSpec(
                group["name"],
                tuple(
                    Member(
                        member["layer"],
                        tuple(member["heads"]),
                        PageLayout(**member["k_layout"]),
                        PageLayout(**member["v_layout"]),
                    )
                    for member in group["members"]
                ),
                group["block_tokens"],
                Retention(**group["retention"]),
                group["imposed"],
                group["recent_of"],
            )
            for group in data["groups"]
        )
        return cls(layers, groups, data["k_format"], data["v_format"], data["layout"], data["capacity"])

    def fingerprint(self) -> str:
        """Hex digest of all that decides how a byte of this cache is read."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return blake3(text.encode()).hexdigest(length=16)
