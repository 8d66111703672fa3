"""Floating point formats: rows side by side, no scales.

Values beyond the largest finite number of a format saturate to it; infinities and NaN stay what they are. That rule
matters for fp16 alone (65,504): fp32 holds all that a model computes, and bf16 has the range of fp32.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from stratakv.codecs.base import Codec
from stratakv.spec import PageLayout


class FloatCodec(Codec):
    """Numbers stored as `dtype`, row after row."""

    dtype: ClassVar[torch.dtype]

    def layout(self, head_dim: int, block_tokens: int) -> PageLayout:
        """A page of `block_tokens * head_dim` numbers."""
        return PageLayout(self.name, head_dim, block_tokens, block_tokens * head_dim * self.dtype.itemsize)

    def encode(self, layout: PageLayout, pages: Tensor, block: Tensor, row: Tensor, values: Tensor) -> None:
        """Convert and scatter the rows."""
        self.place(layout, pages, block, row, (self._converted(values),))

    def decode(self, layout: PageLayout, pages: Tensor, out: Tensor) -> None:
        """Copy and convert whole pages."""
        put(self._numbers(layout, pages), out)

    def move(self, layout: PageLayout, pages: Tensor, new_layout: PageLayout, new_pages: Tensor) -> None:
        """The rows are the page's first bytes."""
        del new_layout
        new_pages[..., : layout.payload_bytes] = pages[..., : layout.payload_bytes]

    def take(self, layout: PageLayout, pages: Tensor, block: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        """Numbers `[n, n_heads, head_dim]`."""
        return (self._numbers(layout, pages)[block, :, row],)

    def place(self, layout: PageLayout, pages: Tensor, block: Tensor, row: Tensor, stored: tuple[Tensor, ...]) -> None:
        """Scatter the rows."""
        numbers = self._numbers(layout, pages)  # [n_blocks, n_heads, block_tokens, head_dim]
        if len(block) == 1:  # a step's one row, for which tensors of indices are a detour
            numbers[int(block), :, int(row)] = stored[0].squeeze(0)
        else:
            numbers[block, :, row] = stored[0]

    def rounded(self, values: Tensor, block_tokens: int = 64) -> Tensor:
        """To `dtype` and back."""
        del block_tokens
        return saturated(self._converted(values), values.dtype)

    def scrub(self, layout: PageLayout, pages: Tensor, n_rows: int) -> None:
        """Zero the rows and the padding behind them."""
        pages[..., n_rows * layout.head_dim * self.dtype.itemsize :] = 0

    def typed(self, layout: PageLayout, pages: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The pages themselves, where `dtype` is the stored one."""
        return self._numbers(layout, pages) if dtype == self.dtype else None

    def _numbers(self, layout: PageLayout, pages: Tensor) -> Tensor:
        payload = pages[..., : layout.payload_bytes].view(self.dtype)
        numbers: Tensor = payload.unflatten(-1, (layout.block_tokens, layout.head_dim))
        return numbers

    def _converted(self, values: Tensor) -> Tensor:
        return values.to(self.dtype)


class Float32(FloatCodec):
    """IEEE single precision: stores what an fp32 model computes, exactly."""

    name = "fp32"
    dtype = torch.float32


class BFloat16(FloatCodec):
    """bfloat16: the range of fp32, 8 bits of precision."""

    name = "bf16"
    dtype = torch.bfloat16

    def _converted(self, values: Tensor) -> Tensor:
        # The largest fp32 numbers round up to infinity in bf16.
        return (
            saturated(values, self.dtype) if values.dtype in (torch.float32, torch.float64) else values.to(self.dtype)
        )


class Float16(FloatCodec):
    """IEEE half precision: 11 bits of precision, largest number 65,504."""

    name = "fp16"
    dtype = torch.float16

    def _converted(self, values: Tensor) -> Tensor:
        return values if values.dtype == self.dtype else saturated(values, self.dtype)


FORMAT_OF_DTYPE = {codec.dtype: codec.name for codec in (Float32, BFloat16, Float16)}
"""The format that stores numbers of a dtype exactly."""


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in `dtype`; finite ones that are too large for it as its largest number, with their sign."""
    largest = torch.finfo(dtype).max
    converted = values.to(dtype)
    overflowed = converted.isinf() & values.isfinite()
    return torch.where(overflowed, torch.full_like(converted, largest).copysign(converted), converted)


def put(values: Tensor, out: Tensor) -> None:
    """Write `values` into `out`; finite ones that are too large for its dtype become the largest number of that."""
    is_held = torch.finfo(values.dtype).max <= torch.finfo(out.dtype).max
    out.copy_(values if is_held else saturated(values, out.dtype))
