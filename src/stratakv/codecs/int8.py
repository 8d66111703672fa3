"""Rotated rows of 8-bit integers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stratakv.codecs.rows import RowCodec

_LARGEST = 127.0
_ZERO = 128.0


class Int8(RowCodec):
    """Integers from -127 to 127, stored 128 higher, and a scale.

    Rotated: without that a key's few large channels set the step for all others. Recent rows matter most: the last 16
    in 16 bits leave a third of the error.
    """

    name = "int8"
    bits = 8
    rotates = True
    residual = 16

    def n_parameters(self, head_dim: int) -> int:
        """The scale: the largest number of the row over 127."""
        del head_dim
        return 1

    def coded(self, rows: Tensor, read: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Numbers over the scale, rounded."""
        scale = read(rows.abs().amax(-1, keepdim=True) / _LARGEST)
        codes = torch.where(scale > 0, rows / scale, 0.0).round().clamp(-_LARGEST, _LARGEST)
        return (codes.nan_to_num(0.0) + _ZERO).to(torch.uint8), scale

    def levels(self, codes: Tensor, parameters: Tensor) -> Tensor:
        """Integers times the scale."""
        return (codes.float() - _ZERO) * parameters
