"""Memory that lasts: for slabs and weights, in large pages where the system has them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from collections import deque

import torch
from torch import Tensor

LEAST_BYTES = 1 << 20
"""Less than this has no use for pages of 2 MiB."""
SPARE_BYTES = 256 << 20
"""So much of what was let go is kept for the next who asks, unless the system takes it."""


def zeros(nbytes: int) -> Tensor:
    """uint8 `[nbytes]` in RAM, zero, as fast to read as this system allows: large pages spare look-ups of addresses.

    Raises:
        MemoryError: the system has no room.
    """
    if nbytes < LEAST_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return zeros_on(torch.device("cpu"), nbytes)
    memory = _spare.take(nbytes)
    is_used = memory is not None
    if memory is None:
        try:
            memory = _mapped(nbytes)
        except MemoryError:  # what is spare counts against limits of a process
            _spare.clear()
            memory = _mapped(nbytes)
    held = (ctypes.c_uint8 * nbytes).from_buffer(memory)
    weakref.finalize(held, _spare.put, memory, nbytes).atexit = False
    with torch.inference_mode(mode=False):
        found = torch.frombuffer(held, dtype=torch.uint8)
        return found.zero_() if is_used else found


def _mapped(nbytes: int) -> mmap.mmap:
    # Private, since the system gives shared memory no large pages.
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no room for {nbytes:,} bytes") from error
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class _Spare:
    """Memory that was let go, at most `SPARE_BYTES`. The system may take its pages whenever it needs some.

    Where it did not, nobody waits for pages again: the first touch of a large page takes milliseconds in virtual
    machines whose own memory comes on demand.
    """

    def __init__(self) -> None:
        self._memories: deque[tuple[int, mmap.mmap]] = deque()

    def put(self, memory: mmap.mmap, nbytes: int) -> None:
        """Keep `memory`, in place of what was let go longest ago. Called by the collector, at any time."""
        try:
            memory.madvise(mmap.MADV_FREE)
        except (OSError, AttributeError):  # a system that cannot take pages back
            return
        self._memories.append((nbytes, memory))
        while sum(size for size, _ in list(self._memories)) > SPARE_BYTES:
            with contextlib.suppress(IndexError):  # another thread was faster
                self._memories.popleft()

    def clear(self) -> None:
        """Give all back to the system."""
        self._memories.clear()

    def take(self, nbytes: int) -> mmap.mmap | None:
        """Memory of that size, not zero, or None."""
        for entry in reversed(list(self._memories)):
            if entry[0] == nbytes:
                with contextlib.suppress(ValueError):  # another thread was faster
                    self._memories.remove(entry)
                    return entry[1]
        return None


_spare = _Spare()


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
