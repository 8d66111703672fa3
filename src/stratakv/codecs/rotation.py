"""Rotations of rows, which spread what is large in a few channels over all of them before numbers are rounded.

Queries and keys that are rotated alike have the same scores, and an output is rotated back once for all rows (QuaRot,
Ashkboos et al. 2024, arXiv:2404.00456).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


@functools.cache
def hadamard(size: int) -> Tensor:
    """fp32 `[size, size]`, symmetric and its own inverse, by Sylvester's construction; `size` is a power of two."""
    with torch.inference_mode(mode=False):  # kept for forwards that are not in that mode, too
        matrix = torch.ones(1, 1, device="cpu")
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix / math.sqrt(size)


def rotated(rows: Tensor) -> Tensor:
    """`rows` `[..., head_dim]` in fp32, rotated in blocks of the largest power of two that divides head_dim.

    Twice is the identity, but for rounding. With an odd head dim nothing is rotated.
    """
    size = rows.shape[-1] & -rows.shape[-1]
    if size == 1:
        return rows
    found: Tensor = (rows.unflatten(-1, (-1, size)) @ hadamard(size).to(rows.device)).flatten(-2)
    return found
