"""Rotations of rows, which spread what is large in a few channels over all of them before numbers are rounded.

Queries and keys that are rotated alike have the same scores, and an output is rotated back once for all rows (QuaRot,
Ashkboos et al. 2024, arXiv:2404.00456).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(rows: Tensor) -> Tensor:
    """`rows` `[..., head_dim]`, by Hadamard matrices of the largest power of two that divides head_dim.

    Twice is the identity, but for rounding. With an odd head dim nothing is rotated. By sums and differences of pairs,
    always in the same order: what a product of matrices gives in the last bits depends on how many rows it has, on
    autocast and on torch's precision settings, and a row's bytes have to depend on the row alone.
    """
    size = rows.shape[-1] & -rows.shape[-1]
    step = 1
    while step < size:
        a, b = rows.unflatten(-1, (rows.shape[-1] // (2 * step), 2, step)).unbind(-2)
        rows = torch.stack((a + b, a - b), -2).flatten(-3)
        step *= 2
    found: Tensor = rows * size**-0.5
    return found
