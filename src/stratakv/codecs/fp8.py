"""Rows of 8-bit floats."""

from __future__ import annotations

import torch

from stratakv.codecs.rows import RowCodec


class Float8(RowCodec):
    """e4m3 (Micikevicius et al. 2022, arXiv:2209.05433): 4 bits of precision over 15 powers of two."""

    name = "fp8"
    dtype = torch.float8_e4m3fn
    largest = 448.0
