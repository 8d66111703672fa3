"""Memory for what is read from one end to the other: in large pages where the system has them."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

LEAST_BYTES = 1 << 20
"""Less than this has no use for pages of 2 MiB."""


def zeros(nbytes: int) -> Tensor:
    """uint8 `[nbytes]` in RAM, zero, as fast to read as this system allows: large pages spare look-ups of addresses."""
    if nbytes < LEAST_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(nbytes, dtype=torch.uint8, device="cpu")
    # Private, since the system gives shared memory no large pages.
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
