"""What decode attention costs over pages, against the time that memory needs to deliver them.

One query, the newest token's, attends to all rows of one layer. The layers of one cache are visited in turn, as a
model's step does, and are so many that what is read has left the processor's caches since it was read before: together
they are several times as large as the last of those. The same rows, gathered into plain tensors, are given to torch's
`scaled_dot_product_attention`, and the query in the same dtype: once as it is, with `enable_gqa`, once with the queries
of a KV head as if they were rows of one, which spares torch the repeating of keys; the faster of the two counts. That
both sides give the same is checked before anything is timed. Then they, and plain reading of a large tensor, are timed
in turn, round by round.
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

SCHEMA = "stratakv.bench.attention/3"
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

    schema   "stratakv.bench.attention/3"
    machine  cpu, cores, threads, load, system, python, torch, transformers, stratakv
    isa      the instruction set of the kernels
    settings rounds, block_tokens
    points   a list of {shape, format, n_tokens, n_layers, bytes_read, paged, sdpa, sdpa_is_grouped, read_bandwidth,
             share, speedup}; paged and sdpa are {length, median_seconds, min_seconds, max_seconds, noise, samples}
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
            for name in formats:
                for n_tokens in lengths:
                    reporter.stage(f"{shape.name}, {name}, {n_tokens:,} tokens")
                    points.append(_measure(backend, shape, name, n_tokens, rounds, block_tokens, reporter))
    return AttentionReport(machine, backend.isa, rounds, block_tokens, tuple(points))


def _measure(
    backend: CpuBackend, shape: Shape, name: str, n_tokens: int, rounds: int, block_tokens: int, reporter: Progress
) -> Point:
    layer = LayerSpec(0, shape.n_kv_heads, shape.head_dim, shape.head_dim)
    bytes_read = build_spec([layer], k_format=name, v_format=name).bytes_read(n_tokens)
    working_set = CACHES * last_level_cache()
    n_layers = max(-(-working_set // bytes_read), 2)
    layers = [replace(layer, index=i) for i in range(n_layers)]
    spec = build_spec(layers, k_format=name, v_format=name, block_tokens=block_tokens)
    generator = torch.Generator().manual_seed(0)
    batch = _filled(spec, n_tokens, generator)
    views = [batch.view(i) for i in range(n_layers)]
    dtype = torch.float32 if name == "fp32" else torch.bfloat16 if name == "bf16" else torch.float16
    query = torch.randn(1, shape.n_query_heads, 1, shape.head_dim, generator=generator).to(dtype)
    grouped = query.view(1, shape.n_kv_heads, -1, shape.head_dim)
    options = AttentionOptions(shape.head_dim**-0.5)
    plain_bytes = 2 * n_tokens * shape.n_kv_heads * shape.head_dim * dtype.itemsize
    gathered = (view.gather(dtype) for view in views[: max(-(-working_set // plain_bytes), 2)])
    plain = [(keys.clone(), values.clone()) for keys, values in gathered]
    words = zeros(max(working_set, bytes_read * n_layers) // 8 * 8).view(torch.int64).fill_(1)

    def paged(view: KVView) -> Tensor:
        return backend.run(query, view, options)[0]

    def sdpa(rows: tuple[Tensor, Tensor]) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, *rows, enable_gqa=True)

    def sdpa_grouped(rows: tuple[Tensor, Tensor]) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(grouped, *rows)

    for theirs in (sdpa(plain[0]), sdpa_grouped(plain[0]).view(query.shape)):
        torch.testing.assert_close(paged(views[0]), theirs, rtol=0.02, atol=0.02)
    ours, repeated, in_groups, reading = [], [], [], []
    for done in range(rounds + 1):  # the first is not counted
        ours.append(_each(paged, views))
        repeated.append(_each(sdpa, plain))
        in_groups.append(_each(sdpa_grouped, plain))
        reading.append(8 * words.numel() / seconds_of(lambda: read_all(words)))
        reporter.advance(done, rounds)
    is_grouped = statistics.median(in_groups[1:]) < statistics.median(repeated[1:])
    return Point(
        shape,
        name,
        n_tokens,
        n_layers,
        bytes_read,
        Timing.of(n_tokens, ours[1:]),
        Timing.of(n_tokens, (in_groups if is_grouped else repeated)[1:]),
        is_grouped,
        statistics.median(reading[1:]),
    )


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
