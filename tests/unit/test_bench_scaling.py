"""The scaling benchmark: its fit, its books, and a whole run on a model of four thousand parameters."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from stratakv.bench.fit import PowerFit, fit_power, fit_timings
from stratakv.bench.growth import measure_growth
from stratakv.bench.report import scaling_tables
from stratakv.bench.samples import Timing
from stratakv.bench.scaling import (
    SCHEMA,
    STEPS_A_ROUND,
    Curve,
    ScalingOptions,
    ScalingReport,
    check_lengths,
    run_scaling,
)
from stratakv.errors import ConfigurationError

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
SHORT = (8, 16, 40, 100)


@pytest.fixture(scope="module")
def tiny() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def report(tiny: Any) -> ScalingReport:
    ids = [i % 64 for i in range(SHORT[-1] + 1)]
    options = ScalingOptions(SHORT, ("paged", "contiguous", "growing"), block_tokens=4, repeats=2)
    return run_scaling(tiny, ids, options, name="tiny")


def costs(exponent: float, intercept: float, noise: float = 0.0, seed: int = 0) -> list[float]:
    """Costs that reach 1 + intercept at the longest length."""
    random = np.random.default_rng(seed)
    exact = intercept + (np.array(LENGTHS) / LENGTHS[-1]) ** exponent
    return [float(cost) for cost in exact * (1 + noise * random.standard_normal(len(LENGTHS)))]


@pytest.mark.parametrize("intercept", [0.0, 0.3])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5, 2.0])
def test_fit_recovers_an_exact_law(exponent: float, intercept: float) -> None:
    fit = fit_power(LENGTHS, costs(exponent, intercept))
    assert fit.exponent == pytest.approx(exponent, abs=0.011)
    assert fit.low <= exponent <= fit.high
    assert fit.intercept == pytest.approx(intercept, abs=0.01)
    assert fit.at(4096) == pytest.approx(1 + intercept, rel=0.01)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_fit_recovers_an_exponent_under_noise(exponent: float, seed: int) -> None:
    fit = fit_power(LENGTHS, costs(exponent, 0.1, noise=0.02, seed=seed), noise=0.02)
    assert fit.exponent == pytest.approx(exponent, abs=0.15)


@pytest.mark.parametrize("struck", range(6))
def test_one_length_that_was_disturbed_moves_the_exponent_little(struck: int) -> None:
    disturbed = costs(1.0, 0.1)
    disturbed[struck] *= 2
    assert fit_power(LENGTHS, disturbed).exponent == pytest.approx(1.0, abs=0.07)


def test_a_line_through_logarithms_would_hide_quadratic_growth_under_an_intercept() -> None:
    hidden = costs(2.0, 3.0)
    naive = np.polyfit(np.log(LENGTHS), np.log(hidden), 1)[0]
    assert naive < 0.1
    assert fit_power(LENGTHS, hidden).exponent == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("seed", range(8))
def test_no_growth_is_reported_as_flat_and_not_as_an_exponent_of_the_noise(seed: int) -> None:
    random = np.random.default_rng(seed)
    fit = fit_power(LENGTHS, list(1 + 0.01 * random.standard_normal(6)), noise=0.02)
    assert (fit.is_flat, fit.exponent, fit.slope) == (True, 0.0, 0.0)
    assert fit.intercept == pytest.approx(1, abs=0.02)


def test_noise_comes_from_the_samples() -> None:
    rising = [1.00, 1.04, 1.10, 1.20]
    steady = [Timing.of(n, [c, c * 1.001, c * 9]) for n, c in zip(SHORT, rising, strict=True)]
    shaky = [Timing.of(n, [c, c * 1.3, c * 1.6]) for n, c in zip(SHORT, rising, strict=True)]
    assert not fit_timings(steady).is_flat
    assert fit_timings(shaky).is_flat


@pytest.mark.parametrize(
    ("lengths", "seconds"),
    [((1, 2, 3), (1.0, 1.0, 1.0)), ((1, 2, 3, 3), (1.0,) * 4), ((1, 2, 3, 4), (1.0, 1.0, 0.0, 1.0))],
)
def test_fit_refuses_what_cannot_be_fitted(lengths: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    with pytest.raises(ConfigurationError):
        fit_power(lengths, seconds)


def test_lengths_measured_in_a_bad_minute_count_less() -> None:
    linear = costs(1.0, 0.1)
    noise = [0.02] * 6
    for i in (3, 4, 5):
        linear[i] *= 5
        noise[i] = 4.0
    assert fit_power(LENGTHS, linear).exponent != pytest.approx(1.0, abs=0.1)
    assert fit_power(LENGTHS, linear, noise).exponent == pytest.approx(1.0, abs=0.1)


def test_timing_is_a_median_with_its_spread() -> None:
    timing = Timing.of(8, [3.0, 1.0, 2.0, 2.5, 50.0])
    assert (timing.median, timing.smallest, timing.largest, timing.n) == (2.5, 1.0, 50.0, 5)
    assert timing.noise == 1.0  # the lower quartile is 2
    assert Timing.of(8, [3.0]).noise == 0.0


def test_growth_copies_nothing_in_pages_and_amortised_when_doubling(tiny: Any) -> None:
    lengths = (16, 64, 65, 500, 1000, 4000)
    paged, contiguous, growing = (measure_growth(tiny, x, lengths) for x in ("paged", "contiguous", "growing"))
    assert [g.bytes_copied for g in (*paged, *contiguous)] == [0] * 12
    assert [g.bytes_copied for g in growing[:2]] == [0, 0]  # the first stretch holds 64 rows
    assert all(0 < g.bytes_copied <= 2 * g.row_bytes for g in growing[2:])
    row = 2 * 2 * 8 * 4  # layers, K and V, head dim, fp32
    for points in (paged, contiguous, growing):
        assert [g.row_bytes for g in points] == [n * row for n in lengths]
        assert all(g.held_bytes * (1 - g.waste) == pytest.approx(g.row_bytes) for g in points)


def test_steps_are_timed_at_their_length_and_forwards_without_a_cache(tiny: Any) -> None:
    seen: list[tuple[int, int | None]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        seen.append((kwargs["input_ids"].shape[1], None if cache is None else cache.seen_tokens))

    handle = tiny.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run_scaling(tiny, list(range(33)), ScalingOptions((4, 8, 16, 32), repeats=2), name="tiny")
    finally:
        handle.remove()
    for length in (4, 8, 16, 32):
        assert seen.count((1, length)) == 2 * (1 + 2 * STEPS_A_ROUND)  # on each visit one to warm up
        assert seen.count((length, None)) == 2 * 2 + (length == 4)
    fed = [(n, held) for n, held in seen if held is not None and n > 1]
    assert fed == [(4, 0), (4, 4), (8, 8), (16, 16)]  # nothing is prefilled twice


def test_json_has_the_documented_keys(report: ScalingReport) -> None:
    found = json.loads(json.dumps(report.to_dict()))
    assert found["schema"] == SCHEMA
    assert set(found) == {
        "schema", "machine", "model", "settings", "cached", "uncached", "growth", "targets",
    }  # fmt: skip
    assert set(found["machine"]) == {
        "cpu", "cores", "threads", "load", "system", "python", "torch", "transformers", "stratakv",
    }  # fmt: skip
    assert found["settings"]["lengths"] == list(SHORT)
    for curve in (*found["cached"].values(), found["uncached"]):
        assert set(curve["fit"]) == {"exponent", "low", "high", "intercept", "slope", "is_flat"}
        assert [point["length"] for point in curve["points"]] == list(SHORT)
        for point in curve["points"]:
            assert set(point) == {
                "length", "median_seconds", "min_seconds", "max_seconds", "noise", "samples",
            }  # fmt: skip
            assert 0 < point["min_seconds"] <= point["median_seconds"] <= point["max_seconds"]
    assert set(found["cached"]) == set(found["growth"]) == {"paged", "contiguous", "growing"}
    assert set(found["growth"]["paged"][0]) == {"length", "bytes_copied", "row_bytes", "held_bytes", "waste"}
    assert set(found["targets"]) == {
        *(f"cached_{layout}_exponent_at_most_1.1" for layout in ("paged", "contiguous", "growing")),
        "uncached_exponent_above_cached",
        "paged_growth_copies_nothing",
        "growing_copies_at_most_twice_its_rows",
    }
    assert found["targets"]["paged_growth_copies_nothing"] == "met"


@pytest.mark.parametrize(
    ("exponent", "low", "high", "verdict"),
    [
        (0.9, 0.8, 1.1, "met"),
        (0.54, 0.1, 3.0, "undecided"),
        (2.0, 1.0, 3.0, "undecided"),
        (1.2, 1.11, 3.0, "missed"),
    ],
)
def test_a_target_is_missed_only_where_the_data_say_so(
    report: ScalingReport, exponent: float, low: float, high: float, verdict: str
) -> None:
    fit = PowerFit(exponent, low, high, 1.0, 1.0, is_flat=False)
    cached = {"paged": replace(report.cached["paged"], fit=fit)}
    copying = {**report.growth, "paged": [replace(report.growth["paged"][0], bytes_copied=1)]}
    targets = replace(report, cached=cached, growth=copying).targets
    assert targets["cached_paged_exponent_at_most_1.1"] == verdict
    assert targets["paged_growth_copies_nothing"] == "missed"
    flat = {"paged": replace(report.cached["paged"], fit=replace(fit, is_flat=True))}
    assert replace(report, cached=flat).targets["cached_paged_exponent_at_most_1.1"] == "met"
    assert targets["growing_copies_at_most_twice_its_rows"] == "met"


@pytest.mark.parametrize(
    ("cached", "uncached", "verdict"),
    [((0.9, 1.1), (1.2, 1.5), "met"), ((0.9, 1.3), (1.2, 1.5), "undecided"), ((1.6, 1.9), (1.2, 1.5), "missed")],
)
def test_running_without_the_cache_must_grow_faster(
    report: ScalingReport, cached: tuple[float, float], uncached: tuple[float, float], verdict: str
) -> None:
    def curve(interval: tuple[float, float]) -> Curve:
        return replace(report.uncached, fit=PowerFit(sum(interval) / 2, *interval, 1.0, 1.0, is_flat=False))

    found = replace(report, cached={"paged": curve(cached)}, uncached=curve(uncached))
    assert found.targets["uncached_exponent_above_cached"] == verdict


def test_tables_show_every_length_and_verdict(report: ScalingReport) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    for part in scaling_tables(report):
        console.print(part)
    text = console.export_text()
    assert all(name in text for name in ("cached, paged", "cached, growing", "uncached", "exponent"))
    assert all(f"│ {length:>8,} │"[-6:] in text for length in SHORT)
    assert "met: paged growth copies nothing" in text


def test_lengths_beyond_the_model_or_the_text_are_refused(tiny: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"257 positions; the model has 256"):
        check_lengths(tiny, (1, 2, 3, 256))
    with pytest.raises(ConfigurationError, match=r"33 tokens are needed, the text has 32"):
        run_scaling(tiny, list(range(32)), ScalingOptions((4, 8, 16, 32)), name="tiny")
