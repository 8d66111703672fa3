"""Pages of small numbers.

Rows lie in tiles of 16, so that a page has room for whole tiles, whatever its number of rows. Parameters, in bf16,
follow behind all tiles.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from stratakv.codecs.arrangements import BY_CHANNELS, TILE_ROWS, Arrangement
from stratakv.codecs.base import Codec
from stratakv.codecs.floats import put, saturated
from stratakv.errors import ConfigurationError
from stratakv.spec import PageLayout, aligned

PARAMETER = torch.bfloat16  # the range of fp32: no row is too large or too small for it
_LARGEST = torch.finfo(PARAMETER).max
MOST = torch.finfo(torch.float32).max


class TileCodec(Codec):
    """Codes of `bits` bits, and parameters."""

    bits: int
    arrangement: Arrangement = BY_CHANNELS

    @abstractmethod
    def parameter_shape(self, head_dim: int, block_tokens: int) -> tuple[int, ...]:
        """Of a page's parameters."""

    @abstractmethod
    def by_row(self, layout: PageLayout, parameters: Tensor) -> Tensor:
        """A page's parameters `[..., *parameter_shape]` for each row: `[..., block_tokens, *shape of a row's]`."""

    @abstractmethod
    def decoded(self, codes: Tensor, parameters: Tensor) -> Tensor:
        """fp32 rows `[..., head_dim]` of codes, and of their parameters in fp32 as `by_row` gives them."""

    @abstractmethod
    def scrub_parameters(self, layout: PageLayout, parameters: Tensor, n_rows: int) -> None:
        """Zero those that belong to no row before `n_rows`."""

    def layout(self, head_dim: int, block_tokens: int) -> PageLayout:
        """The tiles' codes, then the parameters."""
        if min(head_dim, block_tokens) < 1:
            raise ConfigurationError(f"a page needs rows of at least 1 number, got {block_tokens} of {head_dim}")
        codes = aligned(block_tokens, TILE_ROWS) * self.arrangement.row_bytes(head_dim, self.bits)
        parameters = math.prod(self.parameter_shape(head_dim, block_tokens)) * PARAMETER.itemsize
        return PageLayout(self.name, head_dim, block_tokens, codes, parameters)

    def decode(self, layout: PageLayout, pages: Tensor, out: Tensor) -> None:
        """Widen whole pages."""
        codes, parameters = self.parts(layout, pages)
        rows = self.arrangement.unpacked(self.arrangement.rows(codes), layout.head_dim, self.bits)
        put(self.decoded(rows[..., : layout.block_tokens, :], self.by_row(layout, parameters).float()), out)

    def move(self, layout: PageLayout, pages: Tensor, new_layout: PageLayout, new_pages: Tensor) -> None:
        """Tiles and parameters, as they are."""
        first = pages.dim() - 1  # the axis behind those of the pages
        for old, new in zip(self.parts(layout, pages), self.parts(new_layout, new_pages), strict=True):
            new.narrow(first, 0, old.shape[first]).copy_(old)

    def scrub(self, layout: PageLayout, pages: Tensor, n_rows: int) -> None:
        """Zero the rows, their parameters and all padding."""
        codes, parameters = self.parts(layout, pages)
        self.arrangement.scrub(codes, n_rows)
        self.scrub_parameters(layout, parameters, n_rows)
        pages[..., layout.payload_bytes + layout.scale_bytes :] = 0

    def parts(self, layout: PageLayout, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Packed codes as the arrangement views them and parameters `[..., *parameter_shape]`, as views."""
        row_bytes = self.arrangement.row_bytes(layout.head_dim, self.bits)
        codes = self.arrangement.view(pages[..., : layout.payload_bytes], row_bytes)
        end = layout.payload_bytes + layout.scale_bytes
        parameters: Tensor = pages[..., layout.payload_bytes : end].view(PARAMETER)
        return codes, parameters.unflatten(-1, self.parameter_shape(layout.head_dim, layout.block_tokens))


def in_range(values: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """fp32 numbers of at most 1 in size, and the exponents of the powers of two that came off, over `dims` alike.

    Sums and differences of numbers can lead out of what fp32 holds.
    """
    rows = saturated(values.detach(), torch.float32)
    exponent = torch.frexp(rows.abs().amax(dims, keepdim=True)).exponent.clamp(-120, 120)
    return torch.ldexp(rows, -exponent), exponent


def stored(parameters: Tensor, exponent: Tensor) -> Tensor:
    """`parameters` times powers of two in bf16. What is too large for it saturates; what is no number is NaN.

    There is no negative zero, since which zero is the least of several is not the same on all processors.
    """
    large = torch.ldexp(parameters, exponent).clamp(-_LARGEST, _LARGEST) + 0.0
    return torch.where(parameters.isfinite(), large, torch.nan).to(PARAMETER)
