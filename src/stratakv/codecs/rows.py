"""Rows of small numbers, each row with parameters of its own. A row's bytes depend on that row alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from stratakv.codecs.arrangements import BY_ROWS, TILE_ROWS
from stratakv.codecs.base import Codec
from stratakv.codecs.floats import saturated
from stratakv.codecs.rotation import rotated
from stratakv.codecs.tiles import MOST, TileCodec, in_range, stored
from stratakv.spec import PageLayout, aligned


class RowCodec(TileCodec):
    """Codes, and parameters of a row, which lie in tiles, too: each parameter of 16 rows side by side.

    Nothing saturates below 1e37. A row with an infinity or NaN is read as NaN.
    """

    rotates: bool = False
    """Whether rows are rotated before they are rounded, and back when they are read."""

    def for_values(self) -> Codec:
        """Values are summed over rows."""
        codec = type(self)()
        codec.arrangement = BY_ROWS
        return codec

    @abstractmethod
    def n_parameters(self, head_dim: int) -> int:
        """Parameters of a row."""

    @abstractmethod
    def coded(self, rows: Tensor, read: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """What stands for rows: codes, uint8 `[..., head_dim]`, and parameters `[..., n_parameters]`.

        Args:
            rows: fp32 `[..., head_dim]`, rotated, of the order of 1.
            read: gives for parameters what is read once they were stored, which is what codes have to go with.
        """

    @abstractmethod
    def levels(self, codes: Tensor, parameters: Tensor) -> Tensor:
        """fp32 numbers that codes `[..., head_dim]` stand for, in rows that are still rotated."""

    def parameter_shape(self, head_dim: int, block_tokens: int) -> tuple[int, ...]:
        """Tiles, parameters, rows of a tile."""
        return aligned(block_tokens, TILE_ROWS) // TILE_ROWS, self.n_parameters(head_dim), TILE_ROWS

    def encode(self, layout: PageLayout, pages: Tensor, block: Tensor, row: Tensor, values: Tensor) -> None:
        """Round rows, and write them with their parameters."""
        codes, parameters = self._coded(values)
        self.place(layout, pages, block, row, (self.arrangement.packed(codes, self.bits), parameters))

    def take(self, layout: PageLayout, pages: Tensor, block: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        """Packed codes `[n, n_heads, ...]` and parameters `[n, n_heads, n_parameters]`."""
        codes, parameters = self.parts(layout, pages)
        return codes[self.arrangement.at(block, row)], parameters[block, :, row // TILE_ROWS, :, row % TILE_ROWS]

    def place(self, layout: PageLayout, pages: Tensor, block: Tensor, row: Tensor, stored: tuple[Tensor, ...]) -> None:
        """Scatter the rows."""
        codes, parameters = self.parts(layout, pages)
        codes[self.arrangement.at(block, row)] = stored[0]
        parameters[block, :, row // TILE_ROWS, :, row % TILE_ROWS] = stored[1]

    def rounded(self, values: Tensor, block_tokens: int = 64) -> Tensor:
        """Coded and back."""
        del block_tokens
        codes, parameters = self._coded(values)
        return saturated(self.decoded(codes, parameters.float()), values.dtype)

    def by_row(self, layout: PageLayout, parameters: Tensor) -> Tensor:
        """`[..., block_tokens, n_parameters]`."""
        rows: Tensor = parameters.movedim(-1, -2).flatten(-3, -2)
        return rows[..., : layout.block_tokens, :]

    def decoded(self, codes: Tensor, parameters: Tensor) -> Tensor:
        """Levels, rotated back; scaled, so that sums stay in what fp32 holds."""
        exponent = torch.frexp(parameters.abs().amax(-1, keepdim=True)).exponent.clamp(-120, 120)
        rows = self.levels(codes, torch.ldexp(parameters, -exponent))
        return torch.ldexp(rotated(rows) if self.rotates else rows, exponent).clamp(-MOST, MOST)

    def scrub_parameters(self, layout: PageLayout, parameters: Tensor, n_rows: int) -> None:
        """Those of later rows."""
        tile, lane = divmod(n_rows, TILE_ROWS)
        parameters[..., tile + (lane > 0) :, :, :] = 0
        if lane:
            parameters[..., tile, :, lane:] = 0

    def _coded(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of rows `[..., head_dim]` and their parameters in bf16."""
        rows, exponent = in_range(values, (-1,))
        codes, parameters = self.coded(
            rotated(rows) if self.rotates else rows, lambda p: torch.ldexp(stored(p, exponent).float(), -exponent)
        )
        is_number = parameters.isfinite().all(-1, keepdim=True)
        return codes * is_number, stored(torch.where(is_number, parameters, torch.nan), exponent)
