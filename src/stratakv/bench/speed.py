"""What a whole model costs: the decode step and the prefill by length, and several requests together.

The subjects take turns, round by round, on the same tokens, and before each round plain reading of memory is timed (and
for the prefill a matrix product), so that a floor can be set beside every figure that belongs to the same minutes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from stratakv.bench.fit import MIN_POINTS, PowerFit, fit_timings
from stratakv.bench.machine import Machine
from stratakv.bench.samples import Timing, seconds_of
from stratakv.bench.subjects import Subject
from stratakv.blocks.ram import zeros
from stratakv.extension import read_all
from stratakv.models import Progress, SilentProgress

SCHEMA = "stratakv.bench.speed/1"
KINDS = ("decode", "prefill", "batch")
WORDS = 1 << 25
"""int64 words that are read to measure the bandwidth: 256 MiB, more than the caches hold."""
WARM_STEPS = 2


@dataclass(frozen=True)
class SpeedOptions:
    """What to measure. `sizes` are prompt lengths, for the batch the numbers of requests."""

    kind: str
    sizes: tuple[int, ...]
    rounds: int = 5
    steps: int = 20  # of decoding, in each round; for the batch, all new tokens of a request
    prompt_tokens: int = 128  # of a request in the batch


@dataclass(frozen=True)
class Point:
    """One subject at one size. `seconds` are of one decode step, of one prefill, of a whole batch."""

    subject: str
    size: int
    seconds: tuple[float, ...]
    floor_seconds: float | None  # None: the batch
    floor_of: dict[str, float] = field(default_factory=dict)  # what the floor was computed from

    @property
    def median(self) -> float:
        """Of all rounds and steps."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON report."""
        return {
            "subject": self.subject,
            "size": self.size,
            "median_seconds": self.median,
            "min_seconds": min(self.seconds),
            "max_seconds": max(self.seconds),
            "samples": len(self.seconds),
            "floor_seconds": self.floor_seconds,
            "floor_of": self.floor_of,
        }


@dataclass(frozen=True)
class SpeedReport:
    """All of one run. As JSON (`to_dict`), in seconds and bytes:

    schema    "stratakv.bench.speed/1"
    machine   cpu, cores, threads, load, system, python, torch, transformers, stratakv
    model     name, dtype, format
    settings  kind ("decode", "prefill" or "batch"), sizes, rounds, steps, prompt_tokens
    points    a list of {subject, size, median_seconds, min_seconds, max_seconds, samples, floor_seconds, floor_of}.
              decode: of a step after `size` tokens; floor_of has weight_bytes, kv_bytes, read_bandwidth.
              prefill: of `size` tokens; floor_of has operations, operations_per_second.
              batch: of `size` requests, prompts included; no floor
    growth    decode with four sizes or more: by subject, how the step grows with `size`: {exponent, low, high,
              intercept, slope, is_flat}, as `stratakv.bench.fit` has it
    """

    machine: Machine
    model: dict[str, str]
    settings: SpeedOptions
    points: tuple[Point, ...]

    @property
    def growth(self) -> dict[str, PowerFit]:
        """Of the cost of a decode step with length, by subject."""
        if self.settings.kind != "decode" or len(self.settings.sizes) < MIN_POINTS:
            return {}
        timings: dict[str, list[Timing]] = {}
        for point in self.points:
            timings.setdefault(point.subject, []).append(Timing.of(point.size, point.seconds))
        return {subject: fit_timings(of_one) for subject, of_one in timings.items()}

    def to_dict(self) -> dict[str, Any]:
        """The JSON that the class describes."""
        return {
            "schema": SCHEMA,
            "machine": self.machine.to_dict(),
            "model": self.model,
            "settings": {**asdict(self.settings), "sizes": list(self.settings.sizes)},
            "points": [point.to_dict() for point in self.points],
            "growth": {subject: fit.to_dict() for subject, fit in self.growth.items()},
        }


def run_speed(
    subjects: Sequence[Subject],
    token_ids: Sequence[int],
    settings: SpeedOptions,
    model: dict[str, str],
    progress: Progress | None = None,
) -> SpeedReport:
    """Measure.

    Args:
        subjects: who takes turns.
        token_ids: a text that is long enough for the largest size (for the batch: all prompts one after the other).
        settings: what to measure.
        model: what the report says of the model.
        progress: told of each round.
    """
    reporter = progress or SilentProgress()
    machine = Machine.here()
    measure = {"decode": _decode, "prefill": _prefill, "batch": _batch}[settings.kind]
    points: list[Point] = []
    for size in settings.sizes:
        reporter.stage(f"{settings.kind}, {size:,}")
        points.extend(measure(subjects, torch.tensor(token_ids), size, settings, reporter))
    return SpeedReport(machine, model, settings, tuple(points))


def _decode(
    subjects: Sequence[Subject], text: Tensor, size: int, settings: SpeedOptions, reporter: Progress
) -> list[Point]:
    prompt = text[None, :size]
    following = {subject.name: subject.prefill_seconds(prompt)[1] for subject in subjects}
    seconds: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    bandwidths = []
    for done in range(settings.rounds):
        bandwidths.append(read_bandwidth())
        for subject in subjects:
            name = subject.name
            _, following[name] = subject.decode_seconds(following[name], WARM_STEPS)
            steps, following[name] = subject.decode_seconds(following[name], settings.steps)
            seconds[name].extend(steps)
        reporter.advance(done + 1, settings.rounds)
    bandwidth = statistics.median(bandwidths)
    points = []
    for subject in subjects:
        kv_bytes = subject.cache_spec.bytes_read(size)
        floor = (subject.weight_bytes + kv_bytes) / bandwidth
        of = {"weight_bytes": subject.weight_bytes, "kv_bytes": kv_bytes, "read_bandwidth": bandwidth}
        points.append(Point(subject.name, size, tuple(seconds[subject.name]), floor, of))
        subject.start()  # gives the memory back
    return points


def _prefill(
    subjects: Sequence[Subject], text: Tensor, size: int, settings: SpeedOptions, reporter: Progress
) -> list[Point]:
    prompt = text[None, :size]
    seconds: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    rates = []
    for done in range(settings.rounds + 1):  # the first is not counted
        rates.append(operation_rate())
        for subject in subjects:
            seconds[subject.name].append(subject.prefill_seconds(prompt)[0])
        reporter.advance(done, settings.rounds)
    rate = statistics.median(rates)
    points = []
    for subject in subjects:
        operations = subject.operations(size)
        of = {"operations": operations, "operations_per_second": rate}
        points.append(Point(subject.name, size, tuple(seconds[subject.name][1:]), operations / rate, of))
        subject.start()
    return points


def _batch(
    subjects: Sequence[Subject], text: Tensor, size: int, settings: SpeedOptions, reporter: Progress
) -> list[Point]:
    n = settings.prompt_tokens
    prompts = text[: size * n].view(size, n)
    seconds: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    for done in range(settings.rounds):
        for subject in subjects:
            first, following = subject.prefill_seconds(prompts)
            rest, _ = subject.decode_seconds(following, settings.steps - 1)
            seconds[subject.name].append(first + sum(rest))
        reporter.advance(done + 1, settings.rounds)
    return [Point(subject.name, size, tuple(seconds[subject.name]), None) for subject in subjects]


def read_bandwidth() -> float:
    """Bytes a second that all threads together read."""
    words = zeros(8 * WORDS).view(torch.int64).fill_(1)  # in large pages, as what is measured
    return 8 * WORDS / min(seconds_of(lambda: read_all(words)) for _ in range(3))


def operation_rate() -> float:
    """Multiplications and additions a second of the faster of torch's matrix products here, in fp32 and in bf16."""
    fp32 = _product_rate(torch.float32, 768)
    # Without instructions for it bf16 is a hundred times slower; a few rows show that.
    is_fast = _product_rate(torch.bfloat16, 8) > fp32 / 8
    return max(fp32, _product_rate(torch.bfloat16, 768)) if is_fast else fp32


def _product_rate(dtype: torch.dtype, n_rows: int, n: int = 1536) -> float:
    a, b = torch.ones(n_rows, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
    torch.mm(a, b)
    return 2 * n_rows * n * n / min(seconds_of(lambda: torch.mm(a, b)) for _ in range(3))
