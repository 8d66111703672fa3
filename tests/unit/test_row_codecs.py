"""Formats whose rows have a scale each: bounds, and rows that others' scales were frozen for or drowned in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stratakv.codecs import get_codec
from stratakv.codecs.floats import saturated
from stratakv.codecs.rotation import rotated
from stratakv.testing.running import assert_logits_equal, cache_argument, fed_logits, random_ids
from stratakv.testing.tiny import tiny_gemma3, tiny_llama, tiny_t5
from stratakv.testing.views import drawn
from stratakv.testing.ways import LAYOUTS, WAYS, model_for, small_cache
from stratakv.verification import verify

FORMATS = ("fp8", "int8")
STEPS = {"fp8": 1 / 16, "int8": 0.5 / 127}
"""The most that a number is off: of its own size in fp8, of the largest of its rotated row in int8."""
every_format = pytest.mark.parametrize("name", FORMATS)


def bound(name: str, row: Tensor) -> float:
    """How far, in the Euclidean norm, a stored row may be from `row` `[head_dim]`."""
    size = max(float(row.abs().max()), 1e-37)
    row = (row.double() / size).float()
    largest = rotated(row) if name == "int8" else row
    by_size = row.norm() if name == "fp8" else largest.abs().max() * len(row) ** 0.5
    # A scale has 8 bits, and below 1e-38 fewer.
    scale_error = (float(largest.abs().max()) * size * 2**-9 + 3e-38) * len(row) ** 0.5
    return float(STEPS[name] * by_size * size + scale_error)


@every_format
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(
    numbers=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_finite_row_stays_finite_and_within_the_bound(name: str, numbers: list[float], dtype: torch.dtype) -> None:
    row = saturated(torch.tensor(numbers), dtype)
    found = get_codec(name).rounded(row)
    assert found.dtype == dtype
    assert torch.isfinite(found).all()
    error = float((row.double() - found.double()).norm())
    own = float(row.abs().max()) * torch.finfo(dtype).eps * len(row) ** 0.5  # of what is read, in its own dtype
    assert error <= bound(name, row.float()) + own + 1e-7 * (dtype == torch.float16)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8", "int8"])
def test_who_reads_a_smaller_range_gets_its_largest_number(name: str) -> None:
    codec, rows = get_codec(name), torch.tensor([[[-3e5, 1e5, 7e4, 2e5]]])
    layout = codec.layout(4, 1)
    pages = torch.zeros(1, 1, layout.nbytes, dtype=torch.uint8)
    codec.encode(layout, pages, torch.tensor([0]), torch.tensor([0]), rows)
    out = torch.empty(1, 1, 1, 4, dtype=torch.float16)
    codec.decode(layout, pages, out)
    torch.testing.assert_close(out.float(), rows.clamp(-65504, 65504)[None], rtol=0.04, atol=0)


def test_bytes_are_those_that_the_docs_describe() -> None:
    row = torch.tensor([[[7.0, 1.0, -3.0, 3.0]]])
    expected = {"int8": ([128 + 84, 128, 128 + 84, 255], 6 / 127), "fp8": ([0x7E, 0x68, 0xF4, 0x74], 7 / 448)}
    for name, (numbers, scale) in expected.items():
        codec = get_codec(name)
        layout = codec.layout(4, 1)
        pages = torch.zeros(1, 1, layout.nbytes, dtype=torch.uint8)
        codec.encode(layout, pages, torch.tensor([0]), torch.tensor([0]), row)
        assert pages[0, 0, :4].tolist() == numbers  # of the first of 16 rows
        assert pages[0, 0, 64:66].view(torch.bfloat16).tolist() == [torch.tensor(scale).bfloat16().item()]


@every_format
@pytest.mark.parametrize("head_dim", [24, 64, 128])
def test_a_rows_bytes_depend_on_that_row_alone(name: str, head_dim: int) -> None:
    codec, n = get_codec(name), 3000
    rows = drawn(n, 1, head_dim, generator=torch.Generator().manual_seed(4))
    layout = codec.layout(head_dim, 1)

    def pages(chunk: int) -> Tensor:
        found = torch.zeros(n, 1, layout.nbytes, dtype=torch.uint8)
        for at in range(0, n, chunk):
            block = torch.arange(at, min(at + chunk, n))
            codec.encode(layout, found, block, torch.zeros_like(block), rows[block])
        return found

    whole = pages(n)
    for chunk in (1, 17):
        assert torch.equal(pages(chunk), whole)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pages(n), whole)
        in_autocast = codec.rounded(rows)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(pages(n), whole)
        read = torch.empty(n, 1, 1, head_dim)
        codec.decode(layout, whole, read)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert torch.equal(read[:, :, 0], codec.rounded(rows))
    assert torch.equal(read[:, :, 0], in_autocast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_is_no_part_of_a_format(dtype: torch.dtype) -> None:
    rows = drawn(5, 1, 64, generator=torch.Generator().manual_seed(5))
    expected = get_codec("int8").rounded(rows)
    torch.set_default_dtype(dtype)
    try:
        found = get_codec("int8").rounded(rows)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@every_format
@pytest.mark.parametrize("head_dim", [1, 20, 24, 64, 80])
def test_scales_follow_the_data(name: str, head_dim: int) -> None:
    rows = drawn(200, 2, head_dim, generator=torch.Generator().manual_seed(0))
    rows = rows * torch.logspace(-30, 30, 200)[:, None, None]  # each row beyond the range of those before
    rows, found = rows.double(), get_codec(name).rounded(rows).double()
    error = (found - rows).norm(dim=-1) / rows.norm(dim=-1)
    assert float(error.max()) <= (0.07 if name == "fp8" else 0.03)


@every_format
@pytest.mark.parametrize("outlier", [100.0, -60_000.0])
def test_one_large_channel_leaves_the_others_near(name: str, outlier: float) -> None:
    rows = drawn(50, 2, 64, generator=torch.Generator().manual_seed(1))
    rows[..., 17] = outlier
    error = (get_codec(name).rounded(rows) - rows).abs()
    others = error[..., torch.arange(64) != 17]
    # Floats round each number by its own size; integers share the outlier's, an eighth of it after rotation.
    assert float(others.max()) <= (0.07 * 5 if name == "fp8" and outlier == 100 else abs(outlier) / 8 / 127 * 4)


@every_format
@pytest.mark.parametrize("row", [[0.0] * 8, [3.0] * 8, [0.0] * 7 + [1e38], [1e-3, 0, 0, 0, 0, 0, 0, -1e-3]])
def test_constant_and_single_numbers_come_back(name: str, row: list[float]) -> None:
    given = torch.tensor(row)[None, None]
    largest = float(given.abs().max())
    torch.testing.assert_close(get_codec(name).rounded(given), given, rtol=5e-3, atol=1e-2 * largest)


@every_format
def test_numbers_beyond_fp32_saturate(name: str) -> None:
    rows = torch.tensor([[-1e300, 1.0, 0.0, 1e300]], dtype=torch.float64)
    found = get_codec(name).rounded(rows)
    torch.testing.assert_close(found, rows.clamp(-3.4e38, 3.4e38), rtol=1e-2, atol=1e35)


@every_format
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_shows(name: str, bad: float) -> None:
    rows = torch.ones(2, 1, 8)
    rows[1, 0, 3] = bad
    found = get_codec(name).rounded(rows)
    torch.testing.assert_close(found[0], rows[0], rtol=5e-3, atol=1e-2)
    assert bool(found[1].isnan().all())


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_a_rotation_is_its_own_inverse(size: int) -> None:
    rows = drawn(3, 5 * size, generator=torch.Generator().manual_seed(2))
    signs = rotated(torch.eye(5 * size))[:size, :size] * size**0.5
    assert torch.equal(signs.round().abs(), torch.ones(size, size))
    torch.testing.assert_close(rotated(rotated(rows)), rows)
    torch.testing.assert_close(rotated(rows).norm(dim=-1), rows.norm(dim=-1))


def test_rotation_is_what_makes_integers_good_for_keys() -> None:
    rows = drawn(500, 1, 64, generator=torch.Generator().manual_seed(3))
    rows[..., :2] *= 30  # as keys have it
    plain = rows.abs().amax(-1, keepdim=True) / 127
    error = (get_codec("int8").rounded(rows) - rows).square().mean()
    assert error < 0.3 * ((rows / plain).round() * plain - rows).square().mean()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("formats", [("int8", "int8"), ("fp8", "fp8"), ("int8", "bf16"), ("fp32", "fp8")])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
def test_every_cut_gives_what_rounded_rows_give(make: Any, formats: tuple[str, str], layout: str) -> None:
    options: dict[str, Any] = {"capacity": 64} if layout == "contiguous" else {}
    k_format, v_format = formats
    report = verify(make(), random_ids(2, 40), k_format=k_format, v_format=v_format, layout=layout, **options)
    assert report.passed, report.first_divergence


@every_format
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3, tiny_t5])
def test_reordered_and_cropped_rows_are_the_same_rows(make: Any, way: str, name: str) -> None:
    model, ids = model_for(way, make), random_ids(3, 20)
    inputs: dict[str, Any] = {"input_ids": random_ids(3, 5, seed=1)} if make is tiny_t5 else {}
    # With recent rows in 16 bits, what a step reads depends on where it began.
    cache, whole = (small_cache(model, format=name, residual=0) for _ in range(2))
    expected = fed_logits(model, whole, ids, [1] * 20, **inputs)
    fed_logits(model, cache, ids[:, :16], [11, 5], **inputs)
    order = torch.tensor([2, 0, 1])
    for _ in range(21):  # seven times round
        cache.reorder_cache(order)
    cache.crop(-3)
    cache = cache.fork()
    cache.check()
    assert_logits_equal(fed_logits(model, cache, ids[:, 13:], [1] * 7, **inputs), expected[:, 13:], tolerance=2e-4)


@every_format
def test_bytes_are_counted_with_the_scales(name: str) -> None:
    model = model_for("gathered", tiny_llama)
    alone, cache = (small_cache(model, format=name, block_tokens=64, residual=residual) for residual in (0, None))
    fed_logits(model, alone, random_ids(1, 64))
    fed_logits(model, cache, random_ids(1, 65), [64, 1])
    # 2 layers, 2 heads, K and V: 64 rows of 8 bytes and a scale of 2.
    rows = 2 * 2 * 2 * 64 * (8 + 2)
    assert alone.batch.memory.nbytes == rows
    recent = cache.batch.memory.arenas[1]
    assert recent.spec.retention.window == 16
    assert cache.batch.memory.nbytes == 2 * rows + recent.nbytes  # the 65th row began a block


@every_format
@pytest.mark.parametrize("way", WAYS)
def test_forwards_that_could_train_work_after_one_in_inference_mode(way: str, name: str) -> None:
    model, ids = model_for(way, tiny_llama), random_ids(1, 12)
    expected = fed_logits(model, small_cache(model, format=name), ids, [4, 8])
    cache = small_cache(model, format=name)
    with torch.inference_mode():
        model(input_ids=ids[:, :4], **cache_argument(model, cache))
    embedded = model.get_input_embeddings()(ids[:, 4:]).requires_grad_()
    found = model(inputs_embeds=embedded, **cache_argument(model, cache)).logits
    assert_logits_equal(found.detach(), expected[:, 4:])
