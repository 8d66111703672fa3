"""Which tokens stay: the interface of a retention policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from stratakv.plan import KeepPlan, Run
from stratakv.spec import Retention


class RetentionPolicy(ABC):
    """Decides between steps which rows of a group may go, and during a step which of them a query sees."""

    name: str
    needs: frozenset[str] = frozenset()
    """Signals that `keep` wants collected (attention mass, for one). None are collected unless asked for."""

    @abstractmethod
    def retention(self, layer: int, head: int) -> Retention:
        """What a query sees of this KV head's keys. Heads with equal answers share a group."""

    @abstractmethod
    def keep(self, retention: Retention, seen_tokens: int, runs: tuple[Run, ...], block_tokens: int) -> KeepPlan | None:
        """The rows to keep of those at positions `runs`, or None where all stay.

        Args:
            retention: what `self.retention` gave for the group's heads.
            seen_tokens: tokens seen so far; the next token gets this position.
            runs: positions stored, in the order of their rows.
            block_tokens: rows in a block. A plan that keeps or drops whole blocks moves no bytes.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain data that tells one policy from another, for files and fingerprints."""
