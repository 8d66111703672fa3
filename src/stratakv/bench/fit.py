"""A power law with an intercept, fitted to measured costs.

    cost(n) = intercept + slope * n ** exponent,      intercept, slope >= 0

The intercept is what a step costs at any length (reading the weights, calls); the exponent says how the rest grows. It
is the exponent of the cost minus the intercept, which a straight line through logarithms of the whole cost would
underestimate.

For every exponent on a grid the other two follow from nonnegative least squares, on relative errors: a long length does
not outvote a short one. What is fitted is the smallest sample of each length, since whatever else a machine does only
adds to a cost. An error counts in units of that length's noise (see `Timing`), at least 2 %. Outliers remain on a busy
machine, so errors are weighed by Huber's function (by iterated reweighting): quadratic up to 1.345 units, then linear.

The exponent with the least loss is the estimate. Its interval holds those that are at most half a unit of loss worse:
one standard error. Where a cost without any growth is as good as that, within two units, the growth is not told from
noise: the exponent is 0, `is_flat` is set, and any statement about the shape of the growth would be made up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stratakv.bench.samples import Timing
from stratakv.errors import ConfigurationError

EXPONENTS = np.arange(0.10, 3.0001, 0.01)
MIN_POINTS = 4
MIN_NOISE = 0.02
HUBER = 1.345
INTERVAL_LOSS = 0.5
FLAT_LOSS = 2.0
ITERATIONS = 20

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class PowerFit:
    """The fitted law. `low` and `high` bound the exponent by one standard error."""

    exponent: float
    low: float
    high: float
    intercept: float  # seconds
    slope: float  # seconds at n = 1
    is_flat: bool

    def at(self, n: float) -> float:
        """The cost of length `n`, in seconds."""
        return self.intercept + self.slope * float(n**self.exponent)

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON report."""
        return asdict(self)


def fit_timings(timings: Sequence[Timing]) -> PowerFit:
    """Fit the smallest samples of `timings`, with their own noise."""
    return fit_power([t.length for t in timings], [t.smallest for t in timings], [t.noise for t in timings])


def fit_power(lengths: Sequence[float], costs: Sequence[float], noise: float | Sequence[float] = 0.0) -> PowerFit:
    """Fit the law to `costs` at `lengths`. `noise` is the relative error of a cost, for all or for each.

    Raises:
        ConfigurationError: fewer than four points, or one that is not above 0.
    """
    n, y = np.asarray(lengths, dtype=np.float64), np.asarray(costs, dtype=np.float64)
    if len(n) < MIN_POINTS or len(n) != len(y) or len(set(lengths)) != len(n):
        raise ConfigurationError(f"a fit takes at least {MIN_POINTS} different lengths with a cost each, got {lengths}")
    if not (np.isfinite(y).all() and (y > 0).all() and (n > 0).all()):
        raise ConfigurationError(f"lengths and costs must be above 0, got {list(lengths)} and {list(costs)}")
    unit = y * np.maximum(np.broadcast_to(np.asarray(noise, dtype=np.float64), y.shape), MIN_NOISE)  # seconds
    largest = float(n.max())
    results = [_fit_at(n / largest, y, float(exponent), unit) for exponent in EXPONENTS]
    losses = np.array([loss for loss, _, _ in results])
    best = int(losses.argmin())
    near = EXPONENTS[losses <= losses[best] + INTERVAL_LOSS]
    low, high = float(near.min()), float(near.max())
    flat_cost, flat_loss = _fit_flat(y, unit)
    if flat_loss <= losses[best] + FLAT_LOSS:
        return PowerFit(0.0, 0.0, high, flat_cost, 0.0, is_flat=True)
    exponent = round(float(EXPONENTS[best]), 2)
    _, intercept, slope = results[best]
    return PowerFit(exponent, round(low, 2), round(high, 2), intercept, slope / largest**exponent, is_flat=False)


def _fit_at(x: Vector, y: Vector, exponent: float, unit: Vector) -> tuple[float, float, float]:
    """(loss, intercept, slope) of the best fit with this exponent; x is scaled to 1 at the longest."""
    power = x**exponent
    weights = np.ones_like(y)
    intercept = slope = 0.0
    for _ in range(ITERATIONS):
        intercept, slope = _nonnegative(power, y, weights / unit**2)
        errors = (intercept + slope * power - y) / unit
        weights = _huber_weights(errors)
    return _huber_loss(errors), intercept, slope


def _fit_flat(y: Vector, unit: Vector) -> tuple[float, float]:
    weights = np.ones_like(y)
    cost = 0.0
    for _ in range(ITERATIONS):
        cost = float((weights * y / unit**2).sum() / (weights / unit**2).sum())
        errors = (cost - y) / unit
        weights = _huber_weights(errors)
    return cost, _huber_loss(errors)


def _nonnegative(power: Vector, y: Vector, weights: Vector) -> tuple[float, float]:
    """Weighted least squares for y = a + b * power with a, b >= 0: the free solution, or the better edge."""
    w, wp, wpp = weights.sum(), (weights * power).sum(), (weights * power**2).sum()
    wy, wpy = (weights * y).sum(), (weights * power * y).sum()
    determinant = w * wpp - wp**2
    if determinant > 0:
        a, b = (wpp * wy - wp * wpy) / determinant, (w * wpy - wp * wy) / determinant
        if a >= 0 and b >= 0:
            return float(a), float(b)
    edges = ((0.0, float(wpy / wpp)), (float(wy / w), 0.0))
    return min(edges, key=lambda ab: float((weights * (ab[0] + ab[1] * power - y) ** 2).sum()))


def _huber_weights(errors: Vector) -> Vector:
    return np.minimum(1.0, HUBER / np.maximum(np.abs(errors), 1e-12))


def _huber_loss(errors: Vector) -> float:
    size = np.abs(errors)
    return float(np.where(size <= HUBER, 0.5 * size**2, HUBER * (size - 0.5 * HUBER)).sum())
