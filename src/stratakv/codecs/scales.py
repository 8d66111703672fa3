"""Rows of small numbers with a scale for each row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from stratakv.codecs.rows import RowCodec


class ScaledCodec(RowCodec):
    """Numbers over the scale: the largest number of the row in size is `largest` times it.

    Recent rows matter most: the last 16 in 16 bits leave a third of int8's error.
    """

    bits = 8
    residual = 16
    largest: float

    @abstractmethod
    def codes(self, numbers: Tensor) -> Tensor:
        """uint8 `[...]` that stand for numbers from `-largest` to `largest`, or a rounding beyond, or NaN."""

    @abstractmethod
    def numbers(self, codes: Tensor) -> Tensor:
        """The fp32 numbers that they stand for."""

    def n_parameters(self, head_dim: int) -> int:
        """The scale."""
        del head_dim
        return 1

    def coded(self, rows: Tensor, read: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Codes of numbers over the scale, and the scale."""
        scale = read(rows.abs().amax(-1, keepdim=True) / self.largest)
        return self.codes(torch.where(scale > 0, rows / scale, 0.0)), scale

    def levels(self, codes: Tensor, parameters: Tensor) -> Tensor:
        """Numbers times the scale."""
        return self.numbers(codes) * parameters
