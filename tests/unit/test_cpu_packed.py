"""Kernels over rows of few bits, alone and beside recent rows in 16 bits, against the reference in double precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_checks import queries, threads
from torch import Tensor

from stratakv.attention import AttentionOptions, CpuBackend, ReferenceBackend
from stratakv.blocks.batch import SequenceBatch
from stratakv.blocks.geometry import build_spec
from stratakv.blocks.memory import Memory
from stratakv.blocks.view import KVView
from stratakv.extension import instruction_sets, is_built
from stratakv.policies import RetentionPolicy, Window
from stratakv.spec import LayerSpec
from stratakv.testing.views import drawn

pytestmark = pytest.mark.skipif(not is_built(), reason="installed without the extension, on purpose or for want of g++")

every_isa = pytest.mark.parametrize("isa", instruction_sets())
PAIRS = [
    *(("int8", "int8"), ("fp8", "fp8"), ("int4", "int4"), ("int2", "int2")),
    *(("int4", "fp16"), ("bf16", "int4"), ("int8", "int2"), ("fp8", "int4"), ("fp32", "fp8")),
]
every_pair = pytest.mark.parametrize("formats", PAIRS, ids="-".join)
TOLERANCE = 1e-3
"""Queries and weights are whole numbers of 14 bits where rows are integers,"""
COARSE = 2e-2
"""or of 8 bits where queries have 16 bits and rows fewer than 8."""


def view_of(
    keys: Tensor,
    values: Tensor,
    n_new: int,
    formats: tuple[str, str],
    *,
    block_tokens: int = 64,
    policy: RetentionPolicy | None = None,
    steps: int = 3,
) -> KVView:
    """One layer's view after `steps` steps, of which the last has `n_new` tokens."""
    n_sequences, n_heads, n_rows, k_dim = keys.shape
    layer = LayerSpec(0, n_heads, k_dim, values.shape[3])
    spec = build_spec(
        [layer], k_format=formats[0], v_format=formats[1], block_tokens=block_tokens, policy=policy, residual=None
    )
    batch = SequenceBatch(Memory(spec, device=keys.device, poison=True), policy)
    before = n_rows - n_new
    sizes = [before - min(steps - 2, before), *[1] * min(steps - 2, before), n_new] if before else [n_new]
    at, view = 0, None
    for n in (n for n in sizes if n):
        batch.begin(n_sequences, n)
        view = batch.write(0, keys[:, :, at : at + n], values[:, :, at : at + n])
        at += n
    assert view is not None
    return view


def random_view(
    n_sequences: int,
    n_heads: int,
    n_rows: int,
    n_new: int,
    dims: tuple[int, int],
    formats: tuple[str, str],
    **kwargs: Any,
) -> KVView:
    generator = torch.Generator().manual_seed(n_rows)
    keys = drawn(n_sequences, n_heads, n_rows, dims[0], generator=generator)
    return view_of(keys, drawn(n_sequences, n_heads, n_rows, dims[1], generator=generator), n_new, formats, **kwargs)


def assert_near(isa: str, view: KVView, query: Tensor, options: AttentionOptions) -> None:
    backend = CpuBackend(isa)
    assert backend.supports(view, options, query.dtype) is None
    out, lse = backend.run(query, view, options)
    expected, expected_lse = ReferenceBackend().run(query.double(), view, options)
    arena = view.parts[0].arena
    of_keys, of_values = (
        COARSE if query.dtype != torch.float32 and codec.name in ("int4", "int2") else TOLERANCE
        for codec in (arena.k_codec, arena.v_codec)
    )
    rounding = max(of_keys, of_values, float(torch.finfo(query.dtype).eps))
    torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=rounding)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=of_keys, atol=of_keys)


@every_isa
@every_pair
@pytest.mark.parametrize("n_new", [1, 3, 40])
@pytest.mark.parametrize("block_tokens", [4, 48, 64])
def test_blocks_and_steps(isa: str, formats: tuple[str, str], n_new: int, block_tokens: int) -> None:
    for n_rows in (41, 150, 300):
        view = random_view(2, 2, n_rows, n_new, (64, 64), formats, block_tokens=block_tokens)
        assert_near(isa, view, queries(2, 6, n_new, 64), AttentionOptions(0.125))


@every_isa
@every_pair
@pytest.mark.parametrize("dims", [(8, 6), (24, 20), (80, 80), (128, 96), (256, 128), (5, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_head_dims_and_groups(isa: str, formats: tuple[str, str], dims: tuple[int, int], dtype: torch.dtype) -> None:
    for group, n_new in ((1, 1), (2, 1), (5, 1), (4, 30)):
        view = random_view(1, 2, 200, n_new, dims, formats)
        assert_near(isa, view, queries(1, 2 * group, n_new, dims[0]).to(dtype), AttentionOptions(dims[0] ** -0.5))


@every_isa
@every_pair
@pytest.mark.parametrize("n_rows", [1, 15, 16, 17, 64, 65, 80, 127, 129, 192])
def test_lengths_around_the_edges_of_groups_and_tiles(isa: str, formats: tuple[str, str], n_rows: int) -> None:
    view = random_view(2, 1, n_rows, 1, (32, 32), formats, steps=2)
    assert_near(isa, view, queries(2, 3, 1, 32), AttentionOptions(0.2))


@every_isa
@pytest.mark.parametrize("formats", PAIRS[:4], ids="-".join)
@pytest.mark.parametrize("policy", [Window(7), Window(90, sinks=3), Window((5, 100), sinks=20)])
def test_what_left_a_window_is_not_seen(isa: str, formats: tuple[str, str], policy: Window) -> None:
    for n_new in (1, 40):
        view = random_view(2, 2, 300, n_new, (16, 16), formats, block_tokens=16, policy=policy, steps=30)
        assert_near(isa, view, queries(2, 4, n_new, 16), AttentionOptions(0.3))


@every_isa
@pytest.mark.parametrize("formats", PAIRS[:4], ids="-".join)
@pytest.mark.parametrize("n_new", [1, 40])
def test_masks_softcaps_and_sinks(isa: str, formats: tuple[str, str], n_new: int) -> None:
    view = random_view(2, 2, 200, n_new, (32, 32), formats)
    generator = torch.Generator().manual_seed(3)
    see = drawn(2, 4, n_new, 200, generator=generator) < 0.25
    see[..., :1] = True
    bias, sinks = drawn(2, 4, n_new, 200, generator=generator), drawn(4, generator=generator)
    for options in (
        AttentionOptions(0.3, mask=see),
        AttentionOptions(0.3, bias=bias, softcap=2.0),
        AttentionOptions(0.3, sinks=sinks),
        AttentionOptions(0.3, causal=False),
    ):
        assert_near(isa, view, queries(2, 4, n_new, 32), options)


@every_isa
@pytest.mark.parametrize("formats", PAIRS[:4], ids="-".join)
@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
def test_rows_that_threads_share_are_merged(isa: str, formats: tuple[str, str], n_threads: int) -> None:
    with threads(n_threads):
        for n_sequences, n_heads in ((1, 1), (3, 2)):
            view = random_view(n_sequences, n_heads, 2000, 1, (64, 64), formats)
            assert_near(isa, view, queries(n_sequences, 3 * n_heads, 1, 64), AttentionOptions(0.125))


@every_isa
@pytest.mark.parametrize("formats", PAIRS[:4], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_of_any_dtype(isa: str, formats: tuple[str, str], dtype: torch.dtype) -> None:
    for n_new in (1, 40):
        view = random_view(1, 2, 150, n_new, (64, 64), formats)
        assert_near(isa, view, queries(1, 4, n_new, 64).to(dtype), AttentionOptions(0.125))


@every_isa
@pytest.mark.parametrize("formats", PAIRS[:4], ids="-".join)
def test_large_and_small_rows_keep_their_shares(isa: str, formats: tuple[str, str]) -> None:
    generator = torch.Generator().manual_seed(9)
    keys, values = drawn(1, 1, 200, 64, generator=generator), drawn(1, 1, 200, 64, generator=generator)
    values[:, :, ::3] *= 1000
    keys[..., 7] *= 100
    query = queries(1, 3, 1, 64)
    query[..., 7] /= 100
    view = view_of(keys, values, 1, formats)
    out, _ = CpuBackend(isa).run(query, view, AttentionOptions(0.125))
    expected, _ = ReferenceBackend().run(query.double(), view, AttentionOptions(0.125))
    # Rows of int8 are rotated, so that the large channel's rounding is shared by all.
    allowed = 2e-2 if formats[0] == "int8" else 2e-3
    assert float((out - expected).abs().max()) <= allowed * float(expected.abs().max())


@every_isa
@pytest.mark.parametrize("formats", PAIRS[:4], ids="-".join)
def test_a_query_that_is_no_number_gives_none_and_harms_no_other(isa: str, formats: tuple[str, str]) -> None:
    view = random_view(1, 2, 150, 1, (64, 64), formats)
    query = queries(1, 4, 1, 64)
    expected, _ = CpuBackend(isa).run(query, view, AttentionOptions(0.125))
    query[0, 2, 0, 5] = torch.nan
    out, _ = CpuBackend(isa).run(query, view, AttentionOptions(0.125))
    assert bool(out[0, 2].isnan().all())
    assert torch.equal(out[0, [0, 1, 3]], expected[0, [0, 1, 3]])


def scenes(query: Tensor, n: int, seed: int) -> dict[str, tuple[Tensor, Tensor, float]]:
    """For a query for each of two heads: keys and values, and how much of int4's own error kernels may add."""
    generator = torch.Generator().manual_seed(seed)
    keys, values, rest = (drawn(1, 2, n, 64, generator=generator) for _ in range(3))
    wide = keys.clone()  # one channel decides
    wide[..., 5] += 50 * torch.cos(0.3 * torch.arange(n))
    # One row has nine tenths of all weight, and the others' values are alike, all of them or those beside each other.
    tall, q = 0.02 * keys, query.float()
    tall[:, :, n // 3] = (q / q.norm(dim=-1, keepdim=True) ** 2 * math.log(9 * (n - 1)) / 0.125)[:, :, 0]
    alike = 0.3 * values + 3 * drawn(1, 2, 1, 64, generator=generator)
    beside = 0.1 * values + rest[:, :, ::16].repeat_interleave(16, dim=2)[:, :, :n]
    for v in (alike, beside):
        v[:, :, n // 3] = rest[:, :, 0]
    sizes = values * torch.where(torch.arange(n) % 3 == 0, 100.0, 1.0)[:, None]
    return {
        "random": (keys, values, 0.14),
        "sharp": (3 * keys, values, 0.16),
        "wide channel": (wide, values, 0.45),
        "tall row, values alike": (tall, alike, 0.3),
        "tall row, neighbours alike": (tall, beside, 0.3),
        "values of two sizes": (keys, sizes, 0.14),
    }


@every_isa
@pytest.mark.parametrize("seed", range(3))
def test_what_kernels_round_is_little_beside_what_the_format_does(isa: str, seed: int) -> None:
    query = queries(1, 2, 1, 64, seed).half()
    for name, (keys, values, allowed) in scenes(query, 1500, seed).items():
        for format_name, share in (("int4", allowed), ("int2", allowed / 2)):
            stored, plain = (view_of(keys, values, 1, (f, f)) for f in (format_name, "fp32"))
            out, _ = CpuBackend(isa).run(query, stored, AttentionOptions(0.125))
            of_stored, _ = ReferenceBackend().run(query.double(), stored, AttentionOptions(0.125))
            exact, _ = ReferenceBackend().run(query.double(), plain, AttentionOptions(0.125))
            found = float((out - of_stored).norm()) / float((of_stored - exact).norm())
            assert found <= share, f"{name}, {format_name}: {found:.3f}"


@every_isa
@pytest.mark.parametrize("formats", PAIRS[:4], ids="-".join)
@pytest.mark.parametrize("n_new", [1, 30])
def test_a_value_that_is_no_number_reaches_all_that_see_it(isa: str, formats: tuple[str, str], n_new: int) -> None:
    generator = torch.Generator().manual_seed(9)
    keys, values = (drawn(1, 2, 700, 64, generator=generator) for _ in range(2))
    values[0, 0, 333, 5] = torch.nan
    view, query = view_of(keys, values, n_new, formats), queries(1, 4, n_new, 64)
    out, _ = CpuBackend(isa).run(query, view, AttentionOptions(0.125))
    assert bool(out[0, :2, :, 5].isnan().all())
    assert bool(out[0, 2:].isfinite().all())


@every_isa
@pytest.mark.parametrize("formats", PAIRS[:4], ids="-".join)
@pytest.mark.parametrize("gap", [60.0, 76.0, 80.0, 83.0, 90.0, 200.0])
def test_weights_that_are_almost_nothing_count_as_such(isa: str, formats: tuple[str, str], gap: float) -> None:
    generator = torch.Generator().manual_seed(8)
    values = drawn(1, 1, 400, 64, generator=generator) * 0.05
    keys = torch.zeros(1, 1, 400, 64)
    keys[:, :, :128, 0] = -gap
    query = torch.zeros(1, 1, 1, 64)
    query[..., 0] = 1.0
    assert_near(isa, view_of(keys, values, 1, formats), query, AttentionOptions(1.0))


@every_isa
@pytest.mark.parametrize("formats", PAIRS[:4], ids="-".join)
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-36, 1e-30])
def test_tiny_queries_and_values_give_numbers(isa: str, formats: tuple[str, str], size: float) -> None:
    view = random_view(1, 2, 200, 1, (64, 64), formats)
    assert_near(isa, view, queries(1, 4, 1, 64) * size, AttentionOptions(0.125))
    generator = torch.Generator().manual_seed(8)
    keys, values = drawn(1, 1, 200, 64, generator=generator), drawn(1, 1, 200, 64, generator=generator) * size
    out, _ = CpuBackend(isa).run(queries(1, 2, 1, 64), view_of(keys, values, 1, formats), AttentionOptions(0.125))
    assert float(out.abs().max()) <= 10 * size
