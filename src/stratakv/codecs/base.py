"""The interface of a storage format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from stratakv.spec import PageLayout


class Codec(ABC):
    """Stores rows of numbers in pages of bytes.

    Pages come as uint8 tensors whose last axis is one page (`layout(...).nbytes` long); a codec never allocates them.
    """

    name: str
    residual: int = 0
    """How many of a sequence's last rows should be held in 16 bits as well, and read from there."""
    sinks: int = 0
    """How many of its first rows likewise."""

    def for_keys(self) -> Codec:
        """The codec that stores keys in this format."""
        return self

    def for_values(self) -> Codec:
        """The codec that stores values in this format."""
        return self

    def group_rows(self, block_tokens: int) -> int:
        """How many rows, from the first of a page on, are coded together; the page's last ones may be fewer."""
        del block_tokens
        return 1

    @abstractmethod
    def layout(self, head_dim: int, block_tokens: int) -> PageLayout:
        """The page for `block_tokens` rows of `head_dim` numbers.

        Raises:
            ConfigurationError: this format cannot store such rows.
        """

    @abstractmethod
    def encode(self, layout: PageLayout, pages: Tensor, block: Tensor, row: Tensor, values: Tensor) -> None:
        """Write rows into pages.

        Args:
            layout: what `self.layout` gave for these pages.
            pages: uint8 `[n_blocks, n_heads, layout.nbytes]`, written in place.
            block: int64 `[n]`, the block of each row.
            row: int64 `[n]`, the row's place in its block.
            values: `[n, n_heads, head_dim]`, any floating dtype. Where rows are coded together, whole groups in order.
        """

    @abstractmethod
    def decode(self, layout: PageLayout, pages: Tensor, out: Tensor) -> None:
        """Read whole pages.

        Args:
            layout: what `self.layout` gave for these pages.
            pages: uint8 `[..., layout.nbytes]`.
            out: `[..., block_tokens, head_dim]`, any floating dtype, any strides, written in place.
        """

    @abstractmethod
    def move(self, layout: PageLayout, pages: Tensor, new_layout: PageLayout, new_pages: Tensor) -> None:
        """Copy all rows of smaller pages to the same rows of larger ones, as they are stored: nothing is allocated.

        Args:
            layout, new_layout: what `self.layout` gave for both.
            pages: uint8 `[..., layout.nbytes]`.
            new_pages: uint8 `[..., new_layout.nbytes]`, written in place.
        """

    @abstractmethod
    def take(self, layout: PageLayout, pages: Tensor, block: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        """Rows as they are stored, for `place`: nothing is rounded again where rows move.

        Args:
            layout, pages, block, row: as for `encode`.
        """

    @abstractmethod
    def place(self, layout: PageLayout, pages: Tensor, block: Tensor, row: Tensor, stored: tuple[Tensor, ...]) -> None:
        """Write rows that `take` gave, `[n, ...]` each, into pages of any block size. Arguments as for `encode`."""

    @abstractmethod
    def rounded(self, values: Tensor, block_tokens: int = 64) -> Tensor:
        """What a reader will get for `values` once they were stored, in the dtype of `values`.

        Args:
            values: `[..., head_dim]`; where rows are coded together, `[..., n_rows, head_dim]` from a page's first on.
            block_tokens: rows in a page.
        """

    @abstractmethod
    def scrub(self, layout: PageLayout, pages: Tensor, n_rows: int) -> None:
        """Clear all rows of `pages`, uint8 `[..., layout.nbytes]`, from `n_rows` on: a file holds no stale data."""

    def typed(self, layout: PageLayout, pages: Tensor, dtype: torch.dtype) -> Tensor | None:
        """`pages` as numbers `[..., block_tokens, head_dim]` without a copy, where the stored form *is* `dtype`."""
        del layout, pages, dtype
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain data from which `from_dict` makes this codec again."""
        return {"name": self.name}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Codec:
        """The codec that `to_dict` described."""
        del data
        return cls()
