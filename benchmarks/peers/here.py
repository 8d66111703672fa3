"""What the driver asks of StrataKV's own venv: tokens, the machine, and the read bandwidth of the moment."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.protocol import serve_calls

READS = 5


def machine(threads: int) -> dict[str, Any]:
    """As in the reports of `stratakv bench`."""
    import torch

    from stratakv.bench.machine import Machine

    torch.set_num_threads(threads)
    return Machine.here().to_dict()


def tokens(folder: str, n: int) -> dict[str, Any]:
    """The first `n` tokens of Python's own text."""
    from transformers import AutoTokenizer

    from stratakv.bench.texts import topics_token_ids

    return {"tokens": topics_token_ids(AutoTokenizer.from_pretrained(folder, local_files_only=True), n)}


def bandwidth(threads: int) -> dict[str, Any]:
    """Bytes a second, the best of some reads: what disturbs a read can only slow it down."""
    import torch

    from stratakv.bench.attention import CACHES, last_level_cache
    from stratakv.bench.samples import seconds_of
    from stratakv.extension import read_all

    torch.set_num_threads(threads)
    words = torch.ones(CACHES * last_level_cache() // 8, dtype=torch.int64)
    seconds = [seconds_of(lambda: read_all(words)) for _ in range(READS)]
    return {"bytes_per_second": 8 * words.numel() / min(seconds)}


if __name__ == "__main__":
    serve_calls({"machine": machine, "tokens": tokens, "bandwidth": bandwidth})
