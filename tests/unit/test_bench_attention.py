"""The attention benchmark: its books, and a whole run on a small working set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from rich.console import Console

from stratakv.bench import attention
from stratakv.bench.attention import AttentionReport, Point, Shape, run_attention
from stratakv.bench.machine import Machine
from stratakv.bench.report import attention_table
from stratakv.bench.samples import Timing
from stratakv.cli.bench import SHAPES
from stratakv.errors import ConfigurationError
from stratakv.extension import is_built, read_all

pytestmark = pytest.mark.skipif(not is_built(), reason="installed without the extension, on purpose or for want of g++")


def test_a_run_has_the_documented_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "last_level_cache", lambda: 1 << 16)
    report = run_attention([Shape("tiny", 4, 2, 8)], ["fp16", "fp32", "int8"], [256, 300], rounds=2)
    found = report.to_dict()
    assert set(found) == {"schema", "machine", "isa", "settings", "points", "growth", "targets"}
    assert [(p["format"], p["n_tokens"]) for p in found["points"]] == [
        ("fp16", 256), ("fp32", 256), ("int8", 256), ("fp16", 300), ("fp32", 300), ("int8", 300),
    ]  # fmt: skip
    first = {point.n_tokens: point.paged.median for point in report.points if point.format == "fp16"}
    for point in report.points:
        row = {"fp16": 16, "fp32": 32, "int8": 10}[point.format]  # bytes: 8 numbers, in int8 with a scale
        recent = 16 * 6 if point.format == "int8" else 0  # and so many bytes more for the rows that are read in 16 bits
        assert point.bytes_read == 2 * 2 * (point.n_tokens * row + recent)
        assert point.of_first == point.paged.median / first[point.n_tokens]
        assert point.n_layers * point.bytes_read >= attention.CACHES << 16
        assert 0 < point.paged.smallest <= point.paged.median <= point.paged.largest
    with Path(os.devnull).open("w") as nowhere:
        console = Console(width=200, record=True, file=nowhere)
        console.print(attention_table(report))
    assert "fp16" in console.export_text()


@pytest.mark.parametrize("n_tokens", [0, 255, 1 << 40])
def test_lengths_that_cannot_be_measured_are_refused(n_tokens: int) -> None:
    with pytest.raises(ConfigurationError, match="lengths"):
        run_attention([Shape("tiny", 4, 2, 8)], ["fp16"], [300, n_tokens])


def test_growth_is_fitted_by_shape_and_format_where_there_are_lengths_enough() -> None:
    shape = Shape("x", 4, 2, 8)

    def report(lengths: list[int]) -> AttentionReport:
        points = tuple(
            Point(shape, "fp16", n, 3, 1000, Timing.of(n, [1e-5 + 2e-8 * n] * 3), Timing.of(n, [1.0]), True, 1e9, 1.0)
            for n in lengths
        )
        return AttentionReport(Machine.here(), "generic", 3, 64, points)

    assert report([1024, 4096, 16384]).growth == {}
    (fit,) = report([1024, 4096, 16384, 65536]).growth.values()
    assert fit.exponent == pytest.approx(1.0, abs=0.02)


def test_share_and_speedup_are_of_the_medians() -> None:
    point = Point(
        Shape("x", 4, 2, 8), "fp16", 10, 3, 1000, Timing.of(10, [2e-6]), Timing.of(10, [8e-6]), True, 1e9, 1.0
    )
    assert (point.share, point.speedup) == pytest.approx((0.5, 4.0))


@pytest.mark.parametrize("n", [0, 1, 7, 8, 1001])
def test_reading_reads_every_word_once(n: int) -> None:
    assert read_all(torch.arange(n, dtype=torch.int64)) == n * (n - 1) // 2


def test_the_command_names_the_shapes_there_are() -> None:
    assert set(SHAPES) == set(attention.SHAPES)
