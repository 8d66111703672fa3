"""Rows of 8-bit floats."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stratakv.codecs.rows import RowCodec

_LARGEST = 448.0


class Float8(RowCodec):
    """e4m3 (Micikevicius et al. 2022, arXiv:2209.05433), 4 bits of precision over 15 powers of two, and a scale."""

    name = "fp8"
    bits = 8
    residual = 16

    def n_parameters(self, head_dim: int) -> int:
        """The scale: the largest number of the row over 448."""
        del head_dim
        return 1

    def coded(self, rows: Tensor, read: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Numbers over the scale, rounded."""
        scale = read(rows.abs().amax(-1, keepdim=True) / _LARGEST)
        numbers = torch.where(scale > 0, rows / scale, 0.0).clamp(-_LARGEST, _LARGEST)
        return numbers.to(torch.float8_e4m3fn).view(torch.uint8), scale

    def levels(self, codes: Tensor, parameters: Tensor) -> Tensor:
        """Floats times the scale."""
        return codes.view(torch.float8_e4m3fn).float() * parameters
