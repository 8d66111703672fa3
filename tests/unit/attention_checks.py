"""What the tests of the attention kernels share: queries, and the comparison with the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from stratakv.attention import AttentionOptions, CpuBackend, ReferenceBackend
from stratakv.blocks.view import KVView
from stratakv.testing.views import drawn

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def queries(n_sequences: int, n_heads: int, n_new: int, dim: int, seed: int = 5) -> Tensor:
    return drawn(n_sequences, n_heads, n_new, dim, generator=torch.Generator().manual_seed(seed))


def assert_right(isa: str, view: KVView, query: Tensor, options: AttentionOptions, tolerance: float = 3e-6) -> None:
    out, lse = CpuBackend(isa).run(query, view, options)
    expected, expected_lse = ReferenceBackend().run(query.double(), view, options)
    lse_tolerance = 3e-6
    if isa == "amx" and "fp32" not in {view.parts[0].arena.k_codec.name, view.parts[0].arena.v_codec.name}:
        tolerance, lse_tolerance = 8 * tolerance, 2e-5  # it takes 16 of the 24 bits of queries, weights and rows
    rounding = tolerance if query.dtype == torch.float32 else float(torch.finfo(query.dtype).eps)
    torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=rounding)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=lse_tolerance, atol=max(lse_tolerance, 1e-5))


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
