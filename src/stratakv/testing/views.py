"""Views over random rows, without a model."""

from __future__ import annotations

import torch
from torch import Tensor

from stratakv.blocks.batch import SequenceBatch
from stratakv.blocks.geometry import build_spec
from stratakv.blocks.memory import Memory
from stratakv.blocks.view import KVView
from stratakv.policies import RetentionPolicy
from stratakv.spec import LayerSpec


def drawn(*shape: int, generator: torch.Generator) -> Tensor:
    """Normal random numbers on torch's default device, the same on every device."""
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())


def make_view(
    n_sequences: int,
    n_kv_heads: int,
    n_rows: int,
    n_new: int,
    *,
    k_dim: int = 8,
    v_dim: int = 6,
    block_tokens: int = 4,
    format: str = "fp32",
    policy: RetentionPolicy | None = None,
    seed: int = 0,
) -> KVView:
    """A view of one layer with `n_rows` random rows of size about 1, of which the last `n_new` are the step's own.

    Freed blocks, and rows that were never written, are NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = drawn(n_sequences, n_kv_heads, n_rows, k_dim, generator=generator)
    values = drawn(n_sequences, n_kv_heads, n_rows, v_dim, generator=generator)
    return view_of(keys, values, n_new, block_tokens=block_tokens, format=format, policy=policy)


def view_of(
    keys: Tensor,
    values: Tensor,
    n_new: int,
    *,
    block_tokens: int = 4,
    format: str = "fp32",
    policy: RetentionPolicy | None = None,
) -> KVView:
    """A view of one layer with these rows, `[n_sequences, n_kv_heads, n_rows, dim]`; otherwise as `make_view`."""
    n_sequences, n_kv_heads, n_rows, k_dim = keys.shape
    layer = LayerSpec(0, n_kv_heads, k_dim, values.shape[3])
    spec = build_spec([layer], k_format=format, v_format=format, block_tokens=block_tokens, policy=policy)
    batch = SequenceBatch(Memory(spec, device=keys.device, poison=True), policy)
    steps = [n_rows - n_new, n_new] if n_rows > n_new else [n_new]
    view = None
    start = 0
    for n in steps:
        batch.begin(n_sequences, n)
        view = batch.write(0, keys[:, :, start : start + n], values[:, :, start : start + n])
        start += n
    assert view is not None
    return view
