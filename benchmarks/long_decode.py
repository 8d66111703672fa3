"""What formats give at lengths for which reading a prompt would take hours: decode steps over caches filled with noise.

    python -m benchmarks.long_decode --length 65536 --formats fp16,int8,int4 --rounds 5 --json FILE

The model has SmolLM2's shape (or what the options say) and random weights in 16 bits; the native runner makes steps.
Formats take turns in every round. Times are medians over the rounds, of the median step of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stratakv.bench.machine import Machine
from stratakv.blocks.batch import SequenceBatch
from stratakv.models.native import NativeRunner

CHUNK = 1024
STEPS = 8


@dataclass(frozen=True)
class Row:
    """One format's figures: ms a step in each round, and what the cache has allocated."""

    format: str
    ms: list[float]
    cache_bytes: int

    @property
    def median(self) -> float:
        """Ms a step."""
        return statistics.median(self.ms)


def random_llama(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """A model of the shape asked for, with room for the length."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        vocab_size=arguments.vocabulary,
        max_position_embeddings=arguments.length + CHUNK,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def filled(runner: NativeRunner, format: str, length: int) -> SequenceBatch:
    """A cache of `length` rows of noise."""
    batch = runner.new_batch(format=format)
    generator = torch.Generator().manual_seed(1)
    for start in range(0, length, CHUNK):
        n = min(CHUNK, length - start)
        batch.begin(1, n)
        for layer in batch.memory.spec.layers:
            keys, values = (
                torch.randn(1, layer.n_kv_heads, n, dim, generator=generator) for dim in (layer.k_dim, layer.v_dim)
            )
            batch.write(layer.index, keys, values)
    return batch


def step_ms(runner: NativeRunner, batch: SequenceBatch) -> float:
    """The median of a few steps, in ms."""
    token, times = torch.ones(1, 1, dtype=torch.int32), []
    for _ in range(STEPS):
        began = time.perf_counter()
        runner.next_tokens(batch, token)
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=65536, help="tokens in the cache")
    parser.add_argument("--formats", default="fp16,int8,int4,int2", help="the first is compared with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the figures go")
    shape = {"hidden": 576, "intermediate": 1536, "layers": 30, "heads": 9, "kv_heads": 3, "vocabulary": 49152}
    for name, size in shape.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    arguments = parser.parse_args()
    machine = Machine.here()
    runner = NativeRunner(random_llama(arguments), dtype=torch.float16)
    batches = {name: filled(runner, name, arguments.length) for name in arguments.formats.split(",")}
    for batch in batches.values():
        step_ms(runner, batch)  # rows of the last chunk that are recent no more are let go
    rows = [Row(name, [], batch.memory.nbytes) for name, batch in batches.items()]
    for _ in range(arguments.rounds):
        for row in rows:
            row.ms.append(step_ms(runner, batches[row.format]))
    for row in rows:
        spread = f"{min(row.ms):.1f} to {max(row.ms):.1f}"
        ratio = rows[0].median / row.median
        print(f"{row.format:>5} {row.median:8.1f} ms ({spread}) {ratio:5.2f}x {row.cache_bytes / 1e6:8.0f} MB")
    if arguments.json is not None:
        sizes = {name: getattr(arguments, name) for name in (*shape, "length", "rounds")}
        report = {"machine": machine.to_dict(), "shape": sizes, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
