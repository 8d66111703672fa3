"""Rotated rows of 8-bit integers."""

from __future__ import annotations

import torch
from torch import Tensor

from stratakv.codecs.rows import RowCodec


class Int8(RowCodec):
    """Integers from -127 to 127. Rotated: without that a key's few large channels set the step for all others."""

    name = "int8"
    dtype = torch.int8
    largest = 127.0
    rotates = True

    def _as_bytes(self, codes: Tensor) -> Tensor:
        return super()._as_bytes(codes.round().nan_to_num(0.0))
