"""What a verification found, as frozen data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a cached run first left the uncached one.

    Attributes:
        cut: how the tokens were fed.
        token: position of the first token that differs.
        layer: the first layer whose output differs at that token; None where only the logits tell.
        error: how far, relative to what is allowed (above 1 is too far).
    """

    cut: str
    token: int
    layer: int | None
    error: float


@dataclass(frozen=True, slots=True)
class CutResult:
    """One way of feeding the tokens.

    Attributes:
        name: the cut.
        passed: whether every layer's output and every logit is within tolerance.
        max_abs: largest difference of a logit from the oracle whose K/V are rounded in the same way. This and the next
            two are None where the cut was refused or raised an error, and not finite where the logits are not.
        kl: mean KL divergence of the next-token distribution from the exact model's, in nats.
        top1: share of positions at which the likeliest next token is the exact model's.
        first_divergence: where it first went too far, or None.
        refused: why the model's state cannot go back as the cut asks (a recurrent state, say), or None. A refused cut
            neither passes nor fails.
        raised: the error that ended the cut early, which fails it, or None.
    """

    name: str
    passed: bool
    max_abs: float | None = None
    kl: float | None = None
    top1: float | None = None
    first_divergence: Divergence | None = None
    refused: str | None = None
    raised: str | None = None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """All cuts of one cache configuration. The figures are the worst over the cuts; tolerances are relative."""

    model: str
    n_tokens: int
    k_format: str
    v_format: str
    layout: str
    attached: bool
    logit_tolerance: float
    layer_tolerance: float
    cuts: tuple[CutResult, ...]

    @property
    def ran(self) -> tuple[CutResult, ...]:
        """The cuts that were not refused."""
        return tuple(cut for cut in self.cuts if cut.refused is None)

    @property
    def passed(self) -> bool:
        """Whether all cuts that could be fed passed, and there was one."""
        return bool(self.ran) and all(cut.passed for cut in self.ran)

    @property
    def max_abs(self) -> float | None:
        """Largest difference of a logit in any cut; None where no cut was fed to its end."""
        return _worst(cut.max_abs for cut in self.cuts)

    @property
    def kl(self) -> float | None:
        """Largest mean KL divergence from the exact model of any cut, in nats."""
        return _worst(cut.kl for cut in self.cuts)

    @property
    def top1(self) -> float | None:
        """Smallest top-1 agreement with the exact model of any cut."""
        return min((cut.top1 for cut in self.cuts if cut.top1 is not None), default=None)

    @property
    def first_divergence(self) -> Divergence | None:
        """The earliest token that any cut got wrong."""
        found = [cut.first_divergence for cut in self.ran if cut.first_divergence is not None]
        return min(found, key=lambda d: (d.token, -1 if d.layer is None else d.layer), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`. A number that is not finite, which JSON has none for, becomes its name."""
        summary = {name: getattr(self, name) for name in ("passed", "max_abs", "kl", "top1")}
        divergence = self.first_divergence
        summary["first_divergence"] = None if divergence is None else dataclasses.asdict(divergence)
        plain: dict[str, Any] = _spelt({**summary, **dataclasses.asdict(self)})
        return plain


def _worst(values: Iterable[float | None]) -> float | None:
    """The largest; one that is not a number is larger than all."""
    return max((v for v in values if v is not None), key=lambda v: (math.isnan(v), v), default=None)


def _spelt(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _spelt(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelt(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
