"""The benchmarks of whole models, on a tiny one: the subjects say the same, and the books are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from stratakv.bench import speed
from stratakv.bench.machine import Machine
from stratakv.bench.report import speed_table
from stratakv.bench.speed import KINDS, Point, SpeedOptions, SpeedReport, run_speed
from stratakv.bench.subjects import SUBJECTS, Subject, make_subject
from stratakv.cli import bench, bench_speed
from stratakv.errors import ConfigurationError
from stratakv.extension import is_built
from stratakv.testing.tiny import VOCABULARY, tiny_gemma3, tiny_llama

pytestmark = pytest.mark.skipif(not is_built(), reason="installed without the extension, on purpose or for want of g++")

TEXT = torch.randint(0, VOCABULARY, (600,), generator=torch.Generator().manual_seed(0)).tolist()


def fresh(dtype: torch.dtype) -> Any:
    return tiny_llama().to(dtype)


def subjects() -> list[Subject]:
    return [make_subject(name, fresh, torch.float32, "fp32") for name in SUBJECTS]


def test_all_subjects_say_the_same() -> None:
    prompts = torch.tensor(TEXT[:90]).view(3, 30)
    said = []
    for subject in subjects():
        _, first = subject.prefill_seconds(prompts)
        _, last = subject.decode_seconds(first, 20)
        again = subject.prefill_seconds(prompts)[1]
        assert torch.equal(first, again)
        said.append(torch.cat([first, last], dim=1))
    assert torch.equal(said[0], said[1])
    assert torch.equal(said[0], said[2])


def test_bytes_and_operations_are_those_of_the_model() -> None:
    layer = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 64  # q, k, v; output; gate, up, down
    for subject in subjects():
        assert subject.weight_bytes == 4 * (2 * layer + 97 * 32)
        assert subject.cache_spec.bytes_read(10) == 10 * 4 * 2 * 2 * 2 * 8  # layers, K and V, heads, dims
        assert subject.operations(10) == 2 * 10 * 2 * layer + 2 * 97 * 32 + 4 * 2 * 32 * 55


def test_a_window_is_read_no_further() -> None:
    for subject in [
        make_subject(name, lambda dtype: tiny_gemma3(window=5).to(dtype), torch.float32, "bf16") for name in SUBJECTS
    ]:
        width = 4 if subject.name == "dynamic" else 2
        assert subject.cache_spec.bytes_read(20) == width * 2 * 2 * 8 * (20 + 2 * 5)  # K and V, heads, dims; rows


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_has_the_documented_keys(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speed, "WORDS", 1 << 10)
    settings = SpeedOptions(kind, (2, 4), rounds=2, steps=3, prompt_tokens=20)
    report = run_speed(subjects(), TEXT, settings, {"name": "tiny", "dtype": "fp32", "format": "fp32"})
    found = report.to_dict()
    assert set(found) == {"schema", "machine", "model", "settings", "points", "growth"}
    assert [(p["subject"], p["size"]) for p in found["points"]] == [(s, n) for n in (2, 4) for s in SUBJECTS]
    for point in found["points"]:
        assert point["samples"] == (6 if kind == "decode" else 2)
        assert 0 < point["min_seconds"] <= point["median_seconds"] <= point["max_seconds"]
        assert (point["floor_seconds"] is None) == (kind == "batch")
    with (tmp_path / "out").open("w") as nowhere:
        console = Console(width=200, record=True, file=nowhere)
        console.print(speed_table(report))
    assert "native" in console.export_text()


def test_the_growth_of_a_step_is_fitted_where_there_are_lengths_enough() -> None:
    def report(kind: str, sizes: tuple[int, ...]) -> SpeedReport:
        points = tuple(Point("native", n, (0.01 + 1e-6 * n,) * 3, None) for n in sizes)
        return SpeedReport(Machine.here(), {}, SpeedOptions(kind, sizes), points)

    assert report("decode", (128, 1024, 4096)).growth == {}
    assert report("prefill", (128, 1024, 4096, 8192)).growth == {}
    fit = report("decode", (128, 1024, 4096, 8192)).growth["native"]
    assert fit.exponent == pytest.approx(1.0, abs=0.02)
    assert fit.intercept == pytest.approx(0.01, rel=0.02)


def test_an_unknown_subject_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="nobody"):
        make_subject("nobody", fresh, torch.float32, "fp32")


@pytest.mark.parametrize("target", ["nowhere/report.json", "."])
def test_a_report_that_could_not_be_written_is_refused_before_the_work(target: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be written"):
        bench_speed.decode(model="none", report=tmp_path / target)
    with pytest.raises(ConfigurationError, match="cannot be written"):
        bench.attention(report=tmp_path / target)


def test_the_commands_name_the_subjects_there_are() -> None:
    assert bench_speed.SUBJECTS == SUBJECTS
