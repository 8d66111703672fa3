"""How many bytes some memories may hold together."""

from __future__ import annotations

import weakref
from typing import Protocol

from stratakv.errors import CapacityError


class HoldsBytes(Protocol):
    """What a budget counts."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""


class Budget:
    """A limit on the bytes of its members together; None: no limit."""

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self._members: weakref.WeakSet[HoldsBytes] = weakref.WeakSet()

    def admit(self, member: HoldsBytes) -> None:
        """Count the bytes of `member` too."""
        self._members.add(member)

    @property
    def nbytes(self) -> int:
        """Bytes that the members hold."""
        return sum(member.nbytes for member in self._members)

    def allows(self, n_bytes: int) -> bool:
        """Whether the members may hold `n_bytes` more."""
        return self.max_bytes is None or self.nbytes + n_bytes <= self.max_bytes

    def check(self, n_bytes: int) -> None:
        """Raise CapacityError where the members may not hold `n_bytes` more."""
        if not self.allows(n_bytes):
            raise CapacityError(
                f"the cache holds {self.nbytes:,} of its {self.max_bytes:,} bytes and needs {n_bytes:,} more; "
                "nothing was changed"
            )
