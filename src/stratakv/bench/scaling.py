"""What one token costs at each length, with the cache and without it.

With the cache: one forward of one token over a cache of n tokens, which is truncated back to n after each. Without: one
forward of n tokens, of which only the last logits are computed. Both are timed in turn, in rounds, so that whatever
else the machine does strikes both, and every length is visited twice, on the way up and on the way down, so that no
length is measured in a bad minute alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stratakv.bench.fit import PowerFit, fit_timings
from stratakv.bench.growth import Growth, measure_growth
from stratakv.bench.machine import Machine
from stratakv.bench.samples import Timing, seconds_of
from stratakv.blocks.geometry import LAYOUTS
from stratakv.errors import ConfigurationError, StateError
from stratakv.integrations.transformers import KVCache
from stratakv.integrations.transformers.compat import cache_keyword
from stratakv.integrations.transformers.geometry import max_positions
from stratakv.models import Progress, SilentProgress

SCHEMA = "stratakv.bench.scaling/1"
CACHED_EXPONENT_TARGET = 1.1
GROWTH_RATIO_TARGET = 2.0
"""Doubling copies 1 + 1/2 + 1/4 + ... of what is held, whatever the length."""

STEPS_A_ROUND = 10
UNCACHED_BUDGET_SECONDS = 10.0
"""Uncached forwards of one length stop after this on each visit, once there is one."""

PREFILL_CHUNK = 512


@dataclass(frozen=True)
class ScalingOptions:
    """What to measure."""

    lengths: tuple[int, ...]  # rising
    layouts: tuple[str, ...] = ("paged",)  # whose steps are timed; growth is counted for all there are
    format: str | None = None
    block_tokens: int = 64
    repeats: int = 3  # most rounds on each of the two visits to a length


@dataclass(frozen=True)
class Curve:
    """Costs at the lengths, and the law fitted to them."""

    timings: tuple[Timing, ...]
    fit: PowerFit

    @classmethod
    def of(cls, samples: Mapping[int, Sequence[float]]) -> Curve:
        """Summarise and fit the seconds of each length."""
        timings = tuple(Timing.of(length, seconds) for length, seconds in samples.items())
        return cls(timings, fit_timings(timings))

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON report."""
        return {"points": [timing.to_dict() for timing in self.timings], "fit": self.fit.to_dict()}


@dataclass(frozen=True)
class ScalingReport:
    """All of one run. As JSON (`to_dict`), in seconds and bytes throughout:

    schema    "stratakv.bench.scaling/1"
    machine   cpu, cores, threads, load, system, python, torch, transformers, stratakv
    model     name, class, dtype, format, layers, kv_heads, head_dim
    settings  lengths, layouts, format, block_tokens, repeats
    cached    by layout: points, a list of {length, median_seconds, min_seconds, max_seconds, noise, samples}, and
              fit: {exponent, low, high, intercept, slope, is_flat}
    uncached  the same, once
    growth    by layout, for all layouts: a list of {length, bytes_copied, row_bytes, held_bytes, waste}
    targets   what the cache promises: "met", "missed", or "undecided" within the noise
    """

    machine: Machine
    model: Mapping[str, Any]
    settings: ScalingOptions
    cached: Mapping[str, Curve]
    uncached: Curve
    growth: Mapping[str, Sequence[Growth]]

    @property
    def targets(self) -> dict[str, str]:
        """What the cache promises, and whether it was "met" here, "missed", or is "undecided" within the noise."""
        paged_copies = any(g.bytes_copied for g in self.growth["paged"])
        growing_copies = any(g.bytes_copied > GROWTH_RATIO_TARGET * g.row_bytes for g in self.growth["growing"])
        return {
            **{
                f"cached_{layout}_exponent_at_most_{CACHED_EXPONENT_TARGET}": _verdict(curve.fit)
                for layout, curve in self.cached.items()
            },
            "uncached_exponent_above_cached": self._uncached_verdict(),
            "paged_growth_copies_nothing": "missed" if paged_copies else "met",
            "growing_copies_at_most_twice_its_rows": "missed" if growing_copies else "met",
        }

    def _uncached_verdict(self) -> str:
        """Whether a forward without the cache grows faster than every step with it."""
        fits = [curve.fit for curve in self.cached.values()]
        if all(fit.high < self.uncached.fit.low for fit in fits):
            return "met"
        return "missed" if any(fit.low > self.uncached.fit.high for fit in fits) else "undecided"

    def to_dict(self) -> dict[str, Any]:
        """The JSON that the class describes."""
        return {
            "schema": SCHEMA,
            "machine": self.machine.to_dict(),
            "model": dict(self.model),
            "settings": {
                "lengths": list(self.settings.lengths),
                "layouts": list(self.settings.layouts),
                "format": self.settings.format,
                "block_tokens": self.settings.block_tokens,
                "repeats": self.settings.repeats,
            },
            "cached": {layout: curve.to_dict() for layout, curve in self.cached.items()},
            "uncached": self.uncached.to_dict(),
            "growth": {layout: [g.to_dict() for g in points] for layout, points in self.growth.items()},
            "targets": self.targets,
        }


def run_scaling(
    model: Any,
    token_ids: Sequence[int],
    settings: ScalingOptions,
    *,
    name: str,
    progress: Progress | None = None,
) -> ScalingReport:
    """Measure `model` on `token_ids`, of which one more is needed than the longest length.

    Raises:
        ConfigurationError: the text is too short, or the model has no positions for the longest length.
    """
    check_lengths(model, settings.lengths)
    if len(token_ids) <= settings.lengths[-1]:
        raise ConfigurationError(f"{settings.lengths[-1] + 1} tokens are needed, the text has {len(token_ids)}")
    machine = Machine.here()
    reporter = progress or SilentProgress()
    with torch.inference_mode():
        growth = {}
        for layout in LAYOUTS:
            reporter.stage(f"Growing a {layout} cache")
            growth[layout] = measure_growth(
                model, layout, settings.lengths, format=settings.format, block_tokens=settings.block_tokens
            )
        run = _Run(model, torch.tensor([list(token_ids)], device=model.device), settings)
        for length in (*settings.lengths, *reversed(settings.lengths)):
            reporter.stage(f"Timing {length} tokens")
            if run.go_to(length):
                run.measure(length, lambda done: reporter.advance(done, settings.repeats))
    cached = {layout: Curve.of(samples) for layout, samples in run.cached.items()}
    spec = run.caches[settings.layouts[0]].spec
    described = {
        "name": name,
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "format": "/".join(dict.fromkeys((spec.k_format, spec.v_format))),
        "layers": len(spec.layers),
        "kv_heads": spec.layers[0].n_kv_heads,
        "head_dim": spec.layers[0].k_dim,
    }
    return ScalingReport(machine, described, settings, cached, Curve.of(run.uncached), growth)


def _verdict(fit: PowerFit) -> str:
    if fit.is_flat or fit.high <= CACHED_EXPONENT_TARGET:
        return "met"
    return "missed" if fit.low > CACHED_EXPONENT_TARGET else "undecided"


class _Run:
    """The caches, which grow from length to length, and the samples so far."""

    def __init__(self, model: Any, ids: torch.Tensor, settings: ScalingOptions) -> None:
        self._model = model
        self._ids = ids  # [1, n_tokens]
        self._settings = settings
        self._keyword = cache_keyword(model)
        takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last_logits = {"logits_to_keep": 1} if takes_logits_to_keep else {}
        longest = settings.lengths[-1]
        self.caches = {
            layout: KVCache.for_model(
                model,
                format=settings.format,
                layout=layout,
                block_tokens=settings.block_tokens,
                capacity=longest + 1 if layout == "contiguous" else None,
            )
            for layout in settings.layouts
        }
        self.cached: dict[str, dict[int, list[float]]] = {layout: {} for layout in settings.layouts}
        self.uncached: dict[int, list[float]] = {}

    def go_to(self, length: int) -> bool:
        """Bring every cache to `length`: False where rows that it needs have left a window for good."""
        for cache in self.caches.values():
            while cache.seen_tokens < length:
                self._feed(cache, min(PREFILL_CHUNK, length - cache.seen_tokens))
            try:
                cache.truncate(length)
            except StateError:
                return False
        return True

    def measure(self, length: int, on_round: Callable[[int], None]) -> None:
        """Time steps and whole forwards in turn, over caches that hold `length` tokens."""
        for cache in self.caches.values():
            self._step(cache)  # unmeasured: the first call after growth touches new memory
        if not self.uncached:
            self._whole(length)
        spent = 0.0
        for done in range(self._settings.repeats):
            for layout, cache in self.caches.items():
                steps = [self._step(cache) for _ in range(STEPS_A_ROUND)]
                self.cached[layout].setdefault(length, []).extend(steps)
            if spent < UNCACHED_BUDGET_SECONDS:
                seconds = self._whole(length)
                spent += seconds
                self.uncached.setdefault(length, []).append(seconds)
            on_round(done + 1)

    def _step(self, cache: Any) -> float:
        length = cache.seen_tokens
        seconds = seconds_of(lambda: self._feed(cache, 1))
        cache.truncate(length)
        return seconds

    def _whole(self, length: int) -> float:
        ids = self._ids[:, :length]
        return seconds_of(lambda: self._model(input_ids=ids, use_cache=False, **self._last_logits))

    def _feed(self, cache: Any, n_tokens: int) -> None:
        seen = cache.seen_tokens
        ids = self._ids[:, seen : seen + n_tokens]
        self._model(input_ids=ids, use_cache=True, **{self._keyword: cache}, **self._last_logits)


def check_lengths(model: Any, lengths: Sequence[int]) -> None:
    """Raise ConfigurationError where `model` has no position for the token after the longest length."""
    limit = max_positions(model)
    if limit is not None and limit <= lengths[-1]:
        raise ConfigurationError(
            f"a step at {lengths[-1]:,} tokens needs {lengths[-1] + 1:,} positions; the model has {limit:,}"
        )
