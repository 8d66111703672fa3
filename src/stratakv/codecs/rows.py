"""Rows of small numbers, each row with a scale of its own. A row's bytes depend on that row alone."""

from __future__ import annotations

import torch
from torch import Tensor

from stratakv.codecs.base import Codec
from stratakv.codecs.floats import put, saturated
from stratakv.codecs.rotation import rotated
from stratakv.errors import ConfigurationError
from stratakv.spec import PageLayout, aligned

_SCALE = torch.bfloat16  # the range of fp32: no row is too large or too small for it
_MOST = torch.finfo(torch.float32).max


class RowCodec(Codec):
    """Numbers of one byte, and a scale in bf16 a row, the largest of its numbers over the largest that `dtype` holds.

    Nothing saturates. A row with an infinity or NaN is read as NaN.
    """

    dtype: torch.dtype
    largest: float
    rotates: bool = False
    """Whether rows are rotated before they are rounded, and back when they are read."""

    def layout(self, head_dim: int, block_tokens: int) -> PageLayout:
        """The rows' numbers one after the other, then their scales."""
        if min(head_dim, block_tokens) < 1:
            raise ConfigurationError(f"a page needs rows of at least 1 number, got {block_tokens} of {head_dim}")
        payload = aligned(head_dim * block_tokens, _SCALE.itemsize)
        return PageLayout(self.name, head_dim, block_tokens, payload, block_tokens * _SCALE.itemsize)

    def encode(self, layout: PageLayout, pages: Tensor, block: Tensor, row: Tensor, values: Tensor) -> None:
        """Round rows, and write them with their scales."""
        numbers, scales = self._parts(layout, pages)
        codes, scale = self._coded(values)
        numbers[block, :, row] = codes
        scales[block, :, row] = scale

    def decode(self, layout: PageLayout, pages: Tensor, out: Tensor) -> None:
        """Widen whole pages."""
        put(self._decoded(*self._parts(layout, pages)), out)

    def move(self, layout: PageLayout, pages: Tensor, new_layout: PageLayout, new_pages: Tensor) -> None:
        """Numbers and scales, as they are."""
        old, new = self._parts(layout, pages), self._parts(new_layout, new_pages)
        new[0][..., : layout.block_tokens, :] = old[0]
        new[1][..., : layout.block_tokens] = old[1]

    def rounded(self, values: Tensor) -> Tensor:
        """Coded and back."""
        return saturated(self._decoded(*self._coded(values)), values.dtype)

    def scrub(self, layout: PageLayout, pages: Tensor, n_rows: int) -> None:
        """Zero the rows, their scales and all padding."""
        pages[..., n_rows * layout.head_dim : layout.payload_bytes] = 0
        pages[..., layout.payload_bytes + n_rows * _SCALE.itemsize :] = 0

    def _parts(self, layout: PageLayout, pages: Tensor) -> tuple[Tensor, Tensor]:
        """The bytes of the numbers `[..., block_tokens, head_dim]`, and the scales `[..., block_tokens]`."""
        n, end = layout.head_dim * layout.block_tokens, layout.payload_bytes + layout.scale_bytes
        numbers: Tensor = pages[..., :n].unflatten(-1, (layout.block_tokens, layout.head_dim))
        return numbers, pages[..., layout.payload_bytes : end].view(_SCALE)

    def _coded(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The bytes of rows `[..., head_dim]`, and their scales `[...]`."""
        rows = saturated(values.detach(), torch.float32)
        # Rotation adds up a whole row, which may lead out of what fp32 holds: powers of two come off first.
        exponent = torch.frexp(rows.abs().amax(-1, keepdim=True)).exponent.clamp(-120, 120)
        rows = torch.ldexp(rows, -exponent)
        rows = rotated(rows) if self.rotates else rows
        scale = torch.ldexp(rows.abs().amax(-1, keepdim=True) / self.largest, exponent).to(_SCALE)
        step = torch.ldexp(scale.float(), -exponent)
        codes = torch.where(step > 0, rows / step, 0.0).clamp(-self.largest, self.largest)
        return self._as_bytes(codes), torch.where(scale.isfinite(), scale, torch.nan).squeeze(-1)

    def _decoded(self, numbers: Tensor, scales: Tensor) -> Tensor:
        """fp32 rows `[..., head_dim]` of bytes `[..., head_dim]` and scales `[...]`."""
        rows = numbers.view(self.dtype).float()
        rows = rotated(rows) if self.rotates else rows
        return (rows * scales.float().unsqueeze(-1)).clamp(-_MOST, _MOST)

    def _as_bytes(self, codes: Tensor) -> Tensor:
        """uint8: fp32 numbers of at most `largest`, or NaN, rounded to `dtype`."""
        return codes.to(self.dtype).view(torch.uint8)
