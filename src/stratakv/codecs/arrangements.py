"""In which order the codes of a page lie: as dot products of bytes want them, which add up fours of products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from stratakv.spec import aligned

TILE_ROWS = 16
GROUP = 128
"""Channels of a row whose codes share bytes with one another alone, and parameters where not all of a row do."""
_FOUR = 4  # bytes that one dot product takes


class Arrangement(ABC):
    """In which order the codes of a tile lie."""

    @abstractmethod
    def row_bytes(self, head_dim: int, bits: int) -> int:
        """Bytes of a row's codes."""

    @abstractmethod
    def view(self, tiles: Tensor, row_bytes: int) -> Tensor:
        """The bytes of whole tiles `[..., n_tiles * 16 * row_bytes]` as a view that `at` indexes."""

    @abstractmethod
    def at(self, block: Tensor, row: Tensor) -> tuple[Tensor | slice, ...]:
        """Which of a view `[n_blocks, n_heads, ...]` are rows `row` of blocks `block`, int64 `[n]` each."""

    @abstractmethod
    def rows(self, codes: Tensor) -> Tensor:
        """A view's bytes row by row: `[..., n_tiles * 16, *shape of a row]`."""

    @abstractmethod
    def scrub(self, codes: Tensor, n_rows: int) -> None:
        """Zero all rows of a view from `n_rows` on."""

    @abstractmethod
    def packed(self, codes: Tensor, bits: int) -> Tensor:
        """Codes `[..., head_dim]` as the bytes of rows, in a row's shape."""

    @abstractmethod
    def unpacked(self, rows: Tensor, head_dim: int, bits: int) -> Tensor:
        """The codes again."""


class ByChannels(Arrangement):
    """For each few channels, as many as four bytes hold, the four bytes of all 16 rows: for sums over channels."""

    def row_bytes(self, head_dim: int, bits: int) -> int:
        """Whole fours."""
        return aligned(head_dim, _FOUR * 8 // bits) * bits // 8

    def view(self, tiles: Tensor, row_bytes: int) -> Tensor:
        """`[..., n_tiles, n fours, 16, 4]`."""
        fours = row_bytes // _FOUR
        found: Tensor = tiles.unflatten(-1, (-1, fours, TILE_ROWS, _FOUR))
        return found

    def at(self, block: Tensor, row: Tensor) -> tuple[Tensor | slice, ...]:
        """`[n, n_heads, n fours, 4]`."""
        return block, slice(None), row // TILE_ROWS, slice(None), row % TILE_ROWS

    def rows(self, codes: Tensor) -> Tensor:
        """`[..., n_rows, n fours, 4]`."""
        found: Tensor = codes.movedim(-2, -3).flatten(-4, -3)
        return found

    def scrub(self, codes: Tensor, n_rows: int) -> None:
        """Tiles, and what is left of one."""
        tile, lane = divmod(n_rows, TILE_ROWS)
        codes[..., tile + (lane > 0) :, :, :, :] = 0
        if lane:
            codes[..., tile, :, lane:, :] = 0

    def packed(self, codes: Tensor, bits: int) -> Tensor:
        """A byte has codes of channels that are four apart."""
        width = _FOUR * 8 // bits
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % width))
        return _joined(codes.unflatten(-1, (codes.shape[-1] // width, 8 // bits, _FOUR)).unbind(-2), bits)

    def unpacked(self, rows: Tensor, head_dim: int, bits: int) -> Tensor:
        """Of rows `[..., n fours, 4]`."""
        codes: Tensor = torch.stack(_parted(rows, bits), -2).flatten(-3)
        return codes[..., :head_dim]


class ByRows(Arrangement):
    """For each four rows and each byte of a row, that byte of the four: for sums over rows."""

    def row_bytes(self, head_dim: int, bits: int) -> int:
        """Whole bytes of each group of channels."""
        return sum(-(-n // (8 // bits)) for n in _groups(head_dim))

    def view(self, tiles: Tensor, row_bytes: int) -> Tensor:
        """`[..., n_tiles * 4, row_bytes, 4]`."""
        found: Tensor = tiles.unflatten(-1, (-1, row_bytes, _FOUR))
        return found

    def at(self, block: Tensor, row: Tensor) -> tuple[Tensor | slice, ...]:
        """`[n, n_heads, row_bytes]`."""
        return block, slice(None), row // _FOUR, slice(None), row % _FOUR

    def rows(self, codes: Tensor) -> Tensor:
        """`[..., n_rows, row_bytes]`."""
        found: Tensor = codes.movedim(-1, -2).flatten(-3, -2)
        return found

    def scrub(self, codes: Tensor, n_rows: int) -> None:
        """Fours of rows, and what is left of one."""
        four, lane = divmod(n_rows, _FOUR)
        codes[..., four + (lane > 0) :, :, :] = 0
        if lane:
            codes[..., four, :, lane:] = 0

    def packed(self, codes: Tensor, bits: int) -> Tensor:
        """A group's channels are cut into as many stretches as a byte has codes, and a byte has one of each."""
        parts = []
        for group in codes.split(GROUP, -1):
            width = -(-group.shape[-1] // (8 // bits))
            whole = torch.nn.functional.pad(group, (0, width * (8 // bits) - group.shape[-1]))
            parts.append(_joined(whole.split(width, -1), bits))
        return torch.cat(parts, -1)

    def unpacked(self, rows: Tensor, head_dim: int, bits: int) -> Tensor:
        """Of rows `[..., row_bytes]`."""
        sizes = _groups(head_dim)
        widths = [-(-n // (8 // bits)) for n in sizes]
        groups = [torch.cat(_parted(part, bits), -1) for part in rows.split(widths, -1)]
        return torch.cat([group[..., :n] for group, n in zip(groups, sizes, strict=True)], -1)


BY_CHANNELS, BY_ROWS = ByChannels(), ByRows()


def _groups(head_dim: int) -> list[int]:
    """Channels of each group."""
    return [min(GROUP, head_dim - start) for start in range(0, head_dim, GROUP)]


def _joined(fields: Sequence[Tensor], bits: int) -> Tensor:
    """Bytes of one code each of `fields`, the first in the lowest bits."""
    packed = fields[0]
    for i, field in enumerate(fields[1:], 1):
        packed = packed | field << (bits * i)
    return packed


def _parted(packed: Tensor, bits: int) -> list[Tensor]:
    """The fields again."""
    return [packed >> (bits * i) & (2**bits - 1) for i in range(8 // bits)]
