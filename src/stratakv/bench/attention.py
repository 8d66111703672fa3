"""What decode attention costs over pages, against the time that memory needs to deliver them.

One query, the newest token's, attends to all rows of one layer. The layers of one cache are visited in turn, as a
model's step does, and are so many that what is read has left the processor's caches since it was read before: together
they are several times as large as the last of those. The same rows, gathered into plain tensors, are given to torch's
`scaled_dot_product_attention`, and the query in the same dtype: once as it is, with `enable_gqa`, once with the queries
of a KV head as if they were rows of one, which spares torch the repeating of keys; the faster of the two counts. That
both sides give the same is checked before anything is timed. Then all formats, torch over plain tensors of each dtype
and plain reading of a large tensor are timed in turn, round by round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratakv.attention import AttentionOptions, CpuBackend
from stratakv.bench.fit import MIN_POINTS, PowerFit, fit_timings
from stratakv.bench.machine import Machine
from stratakv.bench.samples import Timing, seconds_of
from stratakv.blocks.batch import SequenceBatch
from stratakv.blocks.geometry import build_spec
from stratakv.blocks.memory import Memory
from stratakv.blocks.ram import zeros
from stratakv.blocks.view import KVView
from stratakv.errors import ConfigurationError
from stratakv.extension import read_all
from stratakv.models import Progress, SilentProgress
from stratakv.spec import CacheSpec, LayerSpec

SCHEMA = "stratakv.bench.attention/4"
SHARE_TARGET = 0.8
SPEEDUP_TARGET = 4.0
LONGEST = 1 << 20
CACHES = 4
"""The working set, in sizes of the last-level cache."""
PART = 4096
"""Tokens that are fed at once."""
SHORTEST = 256
"""Tokens. Thousands of layers with fewer would be needed to leave the processor's own caches."""


@dataclass(frozen=True)
class Shape:
    """Heads of one layer."""

    name: str
    n_query_heads: int
    n_kv_heads: int
    head_dim: int


SHAPES = {
    "smollm2": Shape("smollm2", 9, 3, 64),
    "llama-8b": Shape("llama-8b", 32, 8, 128),
}


@dataclass(frozen=True)
class Point:
    """One shape, format and length. The bandwidth is in bytes a second."""

    shape: Shape
    format: str
    n_tokens: int
    n_layers: int
    bytes_read: int  # by one call: every byte of K and V
    paged: Timing
    sdpa: Timing  # with enable_gqa, or grouped: what took less
    sdpa_is_grouped: bool
    read_bandwidth: float
    of_first: float  # the time of the first format of the run

    @property
    def share(self) -> float:
        """Of the read bandwidth measured in the same rounds."""
        return self.bytes_read / self.paged.median / self.read_bandwidth

    @property
    def speedup(self) -> float:
        """Over `scaled_dot_product_attention`."""
        return self.sdpa.median / self.paged.median

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON report."""
        return {
            **asdict(self),
            "paged": self.paged.to_dict(),
            "sdpa": self.sdpa.to_dict(),
            "share": self.share,
            "speedup": self.speedup,
        }


@dataclass(frozen=True)
class AttentionReport:
    """All of one run. As JSON (`to_dict`), in seconds and bytes:

    schema   "stratakv.bench.attention/4"
    machine  cpu, cores, threads, load, system, python, torch, transformers, stratakv
    isa      the instruction set of the kernels
    settings rounds, block_tokens
    points   a list of {shape, format, n_tokens, n_layers, bytes_read, paged, sdpa, sdpa_is_grouped, read_bandwidth,
             of_first (its time over that of the run's first format), share, speedup}; paged and sdpa are {length,
             median_seconds, min_seconds, max_seconds, noise, samples}
    growth   by shape and format, with four lengths or more: how the paged call's cost grows with length: {exponent,
             low, high, intercept, slope, is_flat}, as `stratakv.bench.fit` has it
    targets  by point: whether the share is at least 0.8, and the speedup at least 4
    """

    machine: Machine
    isa: str
    rounds: int
    block_tokens: int
    points: tuple[Point, ...]

    @property
    def growth(self) -> dict[str, PowerFit]:
        """Of the cost of a call with length, by shape and format."""
        timings: dict[str, list[Timing]] = {}
        for point in self.points:
            timings.setdefault(f"{point.shape.name} {point.format}", []).append(point.paged)
        return {name: fit_timings(of_one) for name, of_one in timings.items() if len(of_one) >= MIN_POINTS}

    @property
    def targets(self) -> dict[str, bool]:
        """What the kernels promise, and whether it held."""
        found = {}
        for point in self.points:
            name = f"{point.shape.name} {point.format} {point.n_tokens}"
            found[f"{name}: share at least {SHARE_TARGET}"] = point.share >= SHARE_TARGET
            found[f"{name}: speedup at least {SPEEDUP_TARGET}"] = point.speedup >= SPEEDUP_TARGET
        return found

    def to_dict(self) -> dict[str, Any]:
        """The JSON that the class describes."""
        return {
            "schema": SCHEMA,
            "machine": self.machine.to_dict(),
            "isa": self.isa,
            "settings": {"rounds": self.rounds, "block_tokens": self.block_tokens},
            "points": [point.to_dict() for point in self.points],
            "growth": {name: fit.to_dict() for name, fit in self.growth.items()},
            "targets": self.targets,
        }


def run_attention(
    shapes: Sequence[Shape],
    formats: Sequence[str],
    lengths: Sequence[int],
    *,
    rounds: int = 7,
    block_tokens: int = 64,
    progress: Progress | None = None,
) -> AttentionReport:
    """Measure every combination of `shapes`, `formats` and `lengths` (tokens).

    Raises:
        UnsupportedError: the kernels are not built.
        ConfigurationError: a length below `SHORTEST` or above `LONGEST`.
    """
    for n_tokens in lengths:
        _check_length(n_tokens)
    backend = CpuBackend()
    machine = Machine.here()
    reporter = progress or SilentProgress()
    points = []
    with torch.inference_mode():
        for shape in shapes:
            for n_tokens in lengths:
                reporter.stage(f"{shape.name}, {', '.join(formats)}, {n_tokens:,} tokens")
                points += _measure(backend, shape, formats, n_tokens, rounds, block_tokens, reporter)
    return AttentionReport(machine, backend.isa, rounds, block_tokens, tuple(points))


class _Paged:
    """One format's caches, and what they are asked."""

    def __init__(self, backend: CpuBackend, shape: Shape, name: str, n_tokens: int, block_tokens: int) -> None:
        layer = LayerSpec(0, shape.n_kv_heads, shape.head_dim, shape.head_dim)
        self.format = name
        self.bytes_read = build_spec([layer], k_format=name, v_format=name).bytes_read(n_tokens)
        self.n_layers = max(-(-_working_set() // self.bytes_read), 2)
        layers = [replace(layer, index=i) for i in range(self.n_layers)]
        spec = build_spec(layers, k_format=name, v_format=name, block_tokens=block_tokens)
        batch = _filled(spec, n_tokens, torch.Generator().manual_seed(0))
        self.views = [batch.view(i) for i in range(self.n_layers)]
        self.dtype = torch.float32 if name == "fp32" else torch.bfloat16 if name == "bf16" else torch.float16
        self.query = _query(shape, self.dtype)
        self.seconds: list[float] = []
        self._backend, self._options = backend, AttentionOptions(shape.head_dim**-0.5)

    def attend(self, view: KVView) -> Tensor:
        """Over the pages of one layer."""
        return self._backend.run(self.query, view, self._options)[0]


class _Plain:
    """The rows of some layers in plain tensors, for torch."""

    def __init__(self, shape: Shape, views: Sequence[KVView], dtype: torch.dtype) -> None:
        self.query = _query(shape, dtype)
        self._in_groups = self.query.view(1, shape.n_kv_heads, -1, shape.head_dim)
        n_bytes = 2 * views[0].n_rows * shape.n_kv_heads * shape.head_dim * dtype.itemsize
        gathered = (view.gather(dtype) for view in views[: max(-(-_working_set() // n_bytes), 2)])
        self.rows = [(keys.clone(), values.clone()) for keys, values in gathered]
        self.seconds: list[float] = []
        self.seconds_in_groups: list[float] = []

    @property
    def is_grouped(self) -> bool:
        """Whether that takes less."""
        return statistics.median(self.seconds_in_groups[1:]) < statistics.median(self.seconds[1:])

    def attend(self, rows: tuple[Tensor, Tensor]) -> Tensor:
        """With queries that share keys."""
        return torch.nn.functional.scaled_dot_product_attention(self.query, *rows, enable_gqa=True)

    def attend_in_groups(self, rows: tuple[Tensor, Tensor]) -> Tensor:
        """With queries that share keys as rows of one."""
        return torch.nn.functional.scaled_dot_product_attention(self._in_groups, *rows)


def _measure(
    backend: CpuBackend,
    shape: Shape,
    formats: Sequence[str],
    n_tokens: int,
    rounds: int,
    block_tokens: int,
    reporter: Progress,
) -> list[Point]:
    subjects = [_Paged(backend, shape, name, n_tokens, block_tokens) for name in formats]
    plain: dict[torch.dtype, _Plain] = {}
    for subject in subjects:
        if subject.dtype not in plain:  # formats of few bits are timed beside the rows of the first one
            plain[subject.dtype] = _Plain(shape, subject.views, subject.dtype)
        own = _Plain(shape, subject.views[:1], subject.dtype)
        out = subject.attend(subject.views[0])
        for found in (own.attend(own.rows[0]), own.attend_in_groups(own.rows[0]).view(out.shape)):
            torch.testing.assert_close(out, found, rtol=0.02, atol=0.02)
    most = max(subject.bytes_read * subject.n_layers for subject in subjects)
    words, reading = zeros(max(_working_set(), most) // 8 * 8).view(torch.int64).fill_(1), []
    for done in range(rounds + 1):  # the first is not counted
        for subject in subjects[::-1] if done % 2 else subjects:  # so that none is always the first
            subject.seconds.append(_each(subject.attend, subject.views))
        for theirs in plain.values():
            theirs.seconds.append(_each(theirs.attend, theirs.rows))
            theirs.seconds_in_groups.append(_each(theirs.attend_in_groups, theirs.rows))
        reading.append(8 * words.numel() / seconds_of(lambda: read_all(words)))
        reporter.advance(done, rounds)
    first = Timing.of(n_tokens, subjects[0].seconds[1:])
    points = []
    for subject in subjects:
        theirs, ours = plain[subject.dtype], Timing.of(n_tokens, subject.seconds[1:])
        torchs = theirs.seconds_in_groups if theirs.is_grouped else theirs.seconds
        points.append(
            Point(
                shape,
                subject.format,
                n_tokens,
                subject.n_layers,
                subject.bytes_read,
                ours,
                Timing.of(n_tokens, torchs[1:]),
                theirs.is_grouped,
                statistics.median(reading[1:]),
                ours.median / first.median,
            )
        )
    return points


def _query(shape: Shape, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, shape.n_query_heads, 1, shape.head_dim, generator=generator).to(dtype)


def _working_set() -> int:
    return CACHES * last_level_cache()


def _each(call: Callable[[Any], object], over: Sequence[Any]) -> float:
    """Seconds of one call, over all of `over`."""

    def all_of_them() -> None:
        for each in over:
            call(each)

    return seconds_of(all_of_them) / len(over)


def _filled(spec: CacheSpec, n_tokens: int, generator: torch.Generator) -> SequenceBatch:
    """A cache of random rows, a part at a time, so that no format holds all of them in 16 bits meanwhile."""
    batch = SequenceBatch(Memory(spec, device=torch.device("cpu")))
    rest = n_tokens - 1  # the newest token is the one that attends
    for n in (*[PART] * (rest // PART), *[rest % PART] * bool(rest % PART), 1):
        batch.begin(1, n)
        for layer in spec.layers:
            shape = (1, layer.n_kv_heads, n, layer.k_dim)
            batch.write(layer.index, torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
    return batch


def _check_length(n_tokens: int) -> None:
    if n_tokens < SHORTEST:
        raise ConfigurationError(f"lengths start at {SHORTEST} tokens, got {n_tokens}")
    if n_tokens > LONGEST:
        raise ConfigurationError(f"lengths end at {LONGEST:,} tokens, got {n_tokens:,}")


def last_level_cache() -> int:
    """Bytes of the processor's largest cache; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text(encoding="utf-8").strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes)
