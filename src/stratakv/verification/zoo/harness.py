"""Cached decoding against one uncached forward of the same tokens, with any cache."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache, GenerationConfig
from transformers.generation import GenerationMode

from stratakv.errors import StateError, UnsupportedError
from stratakv.verification.zoo.feeds import (
    FEEDS,
    N_TOKENS,
    PADDED,
    Feed,
    cache_argument,
    fed,
    inputs_for,
    padded,
    real,
    unpadded,
    whole,
    with_positions,
)
from stratakv.verification.zoo.tiny import TinyModel, one_line, quiet

CacheFactory = Callable[[Any], Any]
Attend = Callable[[Any], object]
Status = Literal["pass", "refused", "fail"]

# Of the logits' root mean square. In float32, sums in another order differ by 1e-6 to 1e-5 of it in models of this
# size, and by up to 2e-4 where a recurrent kernel works in chunks (Qwen3.5's gated delta rule); a wrong row, mask or
# position moves the logits by 1e-2 and more. The bound lies between.
TOLERANCE = 5e-4
# Changed tokens must move the last logits by at least this many tolerances, or the model cannot show a fault.
VISIBLE = 20.0
# How many tokens before the last one are changed: all lie inside every tiny window.
N_PROBED = 6


@dataclass(frozen=True)
class FeedResult:
    """One way of feeding.

    ``max_abs`` is the largest absolute difference of the logits, ``reason`` says what was wrong, if anything.
    """

    name: str
    status: Status
    max_abs: float = float("nan")
    reason: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of one cache on one model.

    ``max_abs`` is the largest difference of any logit in any feed, ``tolerance`` what was allowed; ``notes`` say what
    was left out and why.
    """

    status: Status
    reason: str = ""
    max_abs: float = float("nan")
    tolerance: float = float("nan")
    feeds: tuple[FeedResult, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def failed_feeds(self) -> frozenset[str]:
        """Names of the feeds that failed; where it never came to a feed, its reason stands for them."""
        if self.status == "fail" and not self.feeds:
            return frozenset([self.reason])
        return frozenset(feed.name for feed in self.feeds if feed.status == "fail")


def run(tiny: TinyModel, make_cache: CacheFactory, *, attend: Attend | None = None) -> Outcome:
    """Feed 24 tokens whole, then through caches of ``make_cache`` in pieces, and compare the logits everywhere.

    ``attend`` is called once with the model after the uncached forwards: the place for ``stratakv.attach``. An
    UnsupportedError or StateError from either, or from the cache, is 'refused', unless another feed gave something
    wrong: any other exception, NaN, inf or difference beyond the tolerance is 'fail'. Never raises; the model may be
    changed by ``attend``.
    """
    with quiet():
        try:
            return _run(tiny, make_cache, attend)
        except (UnsupportedError, StateError) as error:
            return Outcome("refused", one_line(error))
        except Exception as error:
            return Outcome("fail", one_line(error))


def has_kv_cache(tiny: TinyModel) -> bool:
    """Whether the model puts keys and values into transformers' own cache.

    False for recurrent models (their cache holds states only) and for models that take no cache at all.
    """
    argument = cache_argument(tiny.model)
    if argument is None:
        return False
    with quiet():
        try:
            cache = dynamic_cache_factory(tiny.model)
        except UnsupportedError:
            return False
        calls: list[int] = []
        for part in _self_and_cross(cache):
            _count_updates(part, calls)
        fed(tiny, with_positions(tiny, tiny.inputs(4)), Feed("probe", (3, 1)), cache)
    return bool(calls) or any(_holds_rows(part) for part in _self_and_cross(cache))


def dynamic_cache_factory(model: Any) -> Any:
    """transformers' own default cache for ``model``, made by what ``generate`` calls to make it.

    A model that brings a cache of its own (MiniMax) gets that one. Raises UnsupportedError where there is none.
    """
    made: dict[str, Any] = {}
    model._prepare_cache_for_generation(GenerationConfig(), made, GenerationMode.GREEDY_SEARCH, 1, N_TOKENS)
    for cache in made.values():
        if isinstance(cache, Cache):
            return cache
    return _own_cache(model)


def context_visible(tiny: TinyModel) -> float:
    """How far the last logits move when the ``N_PROBED`` tokens before the last are others: in tolerances."""
    with quiet():
        inputs = with_positions(tiny, tiny.inputs(N_TOKENS))
        ids = inputs[tiny.token_name].clone()
        ids[:, -1 - N_PROBED : -1] = tiny.draw_ids(N_PROBED, 1, torch.Generator().manual_seed(1))
        before, after = whole(tiny, inputs), whole(tiny, {**inputs, tiny.token_name: ids})
    return float((before[:, -1] - after[:, -1]).abs().max()) / _tolerance(before)


def _run(tiny: TinyModel, make_cache: CacheFactory, attend: Attend | None) -> Outcome:
    inputs = [inputs_for(tiny, feed) for feed in FEEDS]
    oracles = [whole(tiny, given) for given in inputs]
    if not all(bool(torch.isfinite(oracle).all()) for oracle in oracles):
        return Outcome("fail", "the uncached forward itself is not finite")
    tolerance = _tolerance(oracles[0])
    visible = context_visible(tiny)
    if not visible >= VISIBLE:
        return Outcome(
            "fail", f"the logits hardly depend on earlier tokens ({visible:.2g} tolerances): no fault would show"
        )
    batch, truth, notes = _padded_oracle(tiny, tolerance)
    if attend is not None:
        attend(tiny.model)
    results = []
    for feed, given, oracle in zip(FEEDS, inputs, oracles, strict=True):
        results.append(_fed(tiny, given, feed, make_cache, oracle, tolerance))
    if batch is not None:
        results.append(_fed(tiny, batch, PADDED, make_cache, truth, tolerance))
    return _outcome(tuple(results), tolerance, notes)


def _fed(
    tiny: TinyModel, inputs: dict[str, Any], feed: Feed, make_cache: CacheFactory, oracle: Tensor, tolerance: float
) -> FeedResult:
    try:
        logits = fed(tiny, inputs, feed, make_cache(tiny.model))
        return _compare(feed.name, real(tiny, logits) if feed is PADDED else logits, oracle, tolerance)
    except (UnsupportedError, StateError) as error:
        return FeedResult(feed.name, "refused", reason=one_line(error))
    except Exception as error:
        return FeedResult(feed.name, "fail", reason=one_line(error))


def _padded_oracle(tiny: TinyModel, tolerance: float) -> tuple[dict[str, Any] | None, Tensor, tuple[str, ...]]:
    """Inputs of the padded batch and the logits of its real tokens; None where the model itself cannot pad."""
    rows = tiny.inputs(N_TOKENS, batch=2, seed=1)
    try:
        truth = unpadded(tiny, rows, lambda alone: whole(tiny, alone))
        batch = padded(tiny, rows)
        difference = float((real(tiny, whole(tiny, batch)) - truth).abs().max())
    except Exception as error:
        return None, torch.empty(0), (f"padded batch left out: uncached, it raises {one_line(error)}",)
    if not difference <= tolerance:
        note = f"padded batch left out: uncached, it differs from the unpadded rows by {difference:.2g}"
        return None, torch.empty(0), (note,)
    return batch, truth, ()


def _tolerance(oracle: Tensor) -> float:
    return TOLERANCE * float(oracle.square().mean().sqrt())


def _compare(name: str, logits: Tensor, oracle: Tensor, tolerance: float) -> FeedResult:
    if logits.shape != oracle.shape:
        raise ValueError(f"{name}: logits of shape {tuple(logits.shape)}, uncached {tuple(oracle.shape)}")
    difference = (logits - oracle).abs().amax(dim=(0, 2))  # [tokens]
    beyond = ~(difference <= tolerance)  # NaN is beyond
    worst = float(difference.max())
    if not bool(beyond.any()):
        return FeedResult(name, "pass", worst)
    return FeedResult(name, "fail", worst, f"{worst:.2g} from position {int(beyond.nonzero()[0])} on")


def _outcome(results: tuple[FeedResult, ...], tolerance: float, notes: tuple[str, ...]) -> Outcome:
    worst = max((result.max_abs for result in results), key=lambda value: (math.isnan(value), value))
    for status in ("fail", "refused"):
        if found := [result for result in results if result.status == status]:
            reasons: dict[str, list[str]] = {}
            for result in found:
                reasons.setdefault(result.reason, []).append(result.name)
            said = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
            if len(reasons) == 1 and len(found) == len(results):
                said = found[0].reason
            allowed = f" (allowed {tolerance:.1g})" if any(not math.isnan(result.max_abs) for result in found) else ""
            return Outcome(status, said + allowed, worst, tolerance, results, notes)
    return Outcome("pass", "", worst, tolerance, results, notes)


def _own_cache(model: Any) -> Any:
    """The cache that a model outside transformers' default brings in its own file (MiniMax)."""
    module = sys.modules[type(model).__module__]
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Cache) and value.__module__ == module.__name__:
            return value()
    raise UnsupportedError(f"transformers has no default cache for {type(model).__name__}")


def _self_and_cross(cache: Any) -> tuple[Any, ...]:
    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache, cache.cross_attention_cache
    return (cache,)


def _count_updates(cache: Any, calls: list[int]) -> None:
    original = cache.update

    def update(key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        calls.append(layer_idx)
        return original(key_states, value_states, layer_idx, *args, **kwargs)

    cache.update = update


def _holds_rows(cache: Any) -> bool:
    return any(isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.numel() > 0 for layer in cache.layers)
