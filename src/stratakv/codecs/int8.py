"""Rotated rows of 8-bit integers."""

from __future__ import annotations

import torch
from torch import Tensor

from stratakv.codecs.scales import ScaledCodec

_ZERO = 128.0


class Int8(ScaledCodec):
    """Integers from -127 to 127, stored 128 higher, and a scale.

    Rotated: without that a key's few large channels set the step for all others.
    """

    name = "int8"
    rotates = True
    largest = 127.0

    def codes(self, numbers: Tensor) -> Tensor:
        """The nearest integers; NaN becomes 0."""
        return (numbers.round().clamp(-self.largest, self.largest).nan_to_num(0.0) + _ZERO).to(torch.uint8)

    def numbers(self, codes: Tensor) -> Tensor:
        """Integers."""
        return codes.float() - _ZERO
