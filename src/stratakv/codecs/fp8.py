"""Rows of 8-bit floats."""

from __future__ import annotations

import torch
from torch import Tensor

from stratakv.codecs.scales import ScaledCodec


class Float8(ScaledCodec):
    """e4m3 (Micikevicius et al. 2022, arXiv:2209.05433), 4 bits of precision over 15 powers of two, and a scale."""

    name = "fp8"
    largest = 448.0

    def codes(self, numbers: Tensor) -> Tensor:
        """The bits of floats; infinities saturate."""
        return numbers.clamp(-self.largest, self.largest).to(torch.float8_e4m3fn).view(torch.uint8)

    def numbers(self, codes: Tensor) -> Tensor:
        """Floats of these bits."""
        return codes.view(torch.float8_e4m3fn).float()
