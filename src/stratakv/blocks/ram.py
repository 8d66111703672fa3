"""Memory that lasts: for slabs and weights, in large pages where the system has them."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

LEAST_BYTES = 1 << 20
"""Less than this has no use for pages of 2 MiB."""


def zeros(nbytes: int) -> Tensor:
    """uint8 `[nbytes]` in RAM, zero, as fast to read as this system allows: large pages spare look-ups of addresses.

    Raises:
        MemoryError: the system has no room.
    """
    if nbytes < LEAST_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return zeros_on(torch.device("cpu"), nbytes)
    # Private, since the system gives shared memory no large pages.
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no room for {nbytes:,} bytes") from error
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    with torch.inference_mode(mode=False):
        return torch.frombuffer(memory, dtype=torch.uint8)


def zeros_on(device: torch.device, nbytes: int) -> Tensor:
    """uint8 `[nbytes]` on a device, zero.

    What is made while a model runs in inference mode could otherwise not be written outside of it.

    Raises:
        MemoryError: the device has no room.
    """
    try:
        with torch.inference_mode(mode=False):
            return torch.zeros(nbytes, dtype=torch.uint8, device=device)
    except (RuntimeError, TypeError) as error:  # as torch reports it in RAM, or a number of bytes beyond 64 bits
        if device.type != "cpu" and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise MemoryError(f"no room for {nbytes:,} bytes on {device}") from error
