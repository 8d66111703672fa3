"""What is stored is what comes back; what does not fit saturates; bytes do not depend on how rows were fed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stratakv.codecs import Codec, codec_names, get_codec, register_codec
from stratakv.codecs.floats import Float32
from stratakv.errors import ConfigurationError
from stratakv.testing.views import drawn

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
every_format = pytest.mark.parametrize("name", TORCH_DTYPES)


def stored(codec: Codec, values: Tensor, block_tokens: int = 4, chunks: list[int] | None = None) -> Tensor:
    """Pages uint8 `[n_blocks, n_heads, nbytes]` of `values` `[n_rows, n_heads, head_dim]`."""
    n_rows, n_heads, head_dim = values.shape
    layout = codec.layout(head_dim, block_tokens)
    pages = torch.zeros(-(-n_rows // block_tokens), n_heads, layout.nbytes, dtype=torch.uint8)
    for rows in torch.arange(n_rows).split(chunks or [n_rows]):
        codec.encode(layout, pages, rows // block_tokens, rows % block_tokens, values[rows])
    return pages


def round_trip(codec: Codec, values: Tensor, dtype: torch.dtype, block_tokens: int = 4) -> Tensor:
    layout = codec.layout(values.shape[2], block_tokens)
    pages = stored(codec, values, block_tokens)
    out = torch.full((*pages.shape[:2], block_tokens, values.shape[2]), torch.nan, dtype=dtype)
    codec.decode(layout, pages, out)
    return out.transpose(1, 2).flatten(0, 1)[: len(values)]


def row(*numbers: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(numbers, dtype=dtype)[None, None]


@every_format
@pytest.mark.parametrize("block_tokens", [1, 4, 5])
@pytest.mark.parametrize("head_dim", [1, 7, 64])
def test_numbers_of_the_formats_own_dtype_come_back_exactly(name: str, block_tokens: int, head_dim: int) -> None:
    dtype = TORCH_DTYPES[name]
    values = drawn(11, 3, head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(round_trip(get_codec(name), values, dtype, block_tokens), values)


@every_format
def test_other_dtypes_are_rounded_to_nearest(name: str) -> None:
    values = drawn(50, 2, 8, generator=torch.Generator().manual_seed(1)) * 100
    expected = values.to(TORCH_DTYPES[name]).float()
    assert torch.equal(round_trip(get_codec(name), values, torch.float32), expected)
    assert torch.equal(get_codec(name).rounded(values), expected)


@every_format
def test_infinities_nan_and_signed_zero_stay_what_they_are(name: str) -> None:
    out = round_trip(get_codec(name), row(torch.inf, -torch.inf, torch.nan, -0.0, 0.0), torch.float32)[0, 0]
    assert out[:2].tolist() == [torch.inf, -torch.inf]
    assert out[2].isnan()
    assert out[3:].signbit().tolist() == [True, False]


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float64])
def test_fp16_saturates_what_is_beyond_its_range(source: torch.dtype) -> None:
    values = row(70000.0, -70000.0, 1e30, -1e30, 65504.0, -65504.0, dtype=source)
    out = round_trip(get_codec("fp16"), values, torch.float32)[0, 0]
    assert out.tolist()[:4] == [65504.0, -65504.0, 65504.0, -65504.0]
    if source != torch.bfloat16:  # which has no 65,504
        assert out.tolist()[4:] == [65504.0, -65504.0]


def test_fp16_rounds_below_the_edge_and_saturates_above_it() -> None:
    # 65,520 is half way to the next step, 65,536, which fp16 has no more.
    out = round_trip(get_codec("fp16"), row(65519.0, 65520.0, 65488.5, -65520.0), torch.float32)[0, 0]
    assert out.tolist() == [65504.0, 65504.0, 65504.0, -65504.0]


def test_bf16_saturates_the_largest_fp32_numbers() -> None:
    largest = torch.finfo(torch.float32).max
    out = round_trip(get_codec("bf16"), row(largest, -largest), torch.float32)[0, 0]
    assert out.tolist() == [torch.finfo(torch.bfloat16).max, torch.finfo(torch.bfloat16).min]


@every_format
def test_small_numbers_keep_their_sign_and_do_not_grow(name: str) -> None:
    out = round_trip(get_codec(name), row(1e-30, -1e-30, 6e-8, -6e-8), torch.float32)[0, 0]
    assert torch.equal(out, row(1e-30, -1e-30, 6e-8, -6e-8)[0, 0].to(TORCH_DTYPES[name]).float())


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(TORCH_DTYPES)),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    block_tokens=st.integers(1, 9),
    head_dim=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_bytes_do_not_depend_on_how_rows_were_fed(
    name: str, chunks: list[int], block_tokens: int, head_dim: int, seed: int
) -> None:
    values = drawn(sum(chunks), 2, head_dim, generator=torch.Generator().manual_seed(seed)) * 1e4
    codec = get_codec(name)
    assert torch.equal(stored(codec, values, block_tokens, chunks), stored(codec, values, block_tokens))


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(TORCH_DTYPES)),
    numbers=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=12),
)
def test_finite_numbers_stay_finite_and_close(name: str, numbers: list[float]) -> None:
    out = round_trip(get_codec(name), row(*numbers), torch.float32)[0, 0].double()
    dtype = TORCH_DTYPES[name]
    info = torch.finfo(dtype)
    expected = torch.tensor(numbers, dtype=torch.float64).clamp(info.min, info.max)
    assert torch.isfinite(out).all()
    assert ((out - expected).abs() <= expected.abs() * info.eps / 2 + info.smallest_normal * info.eps).all()


@every_format
def test_only_the_rows_that_are_named_are_written(name: str) -> None:
    codec = get_codec(name)
    layout = codec.layout(8, 4)
    pages = torch.full((3, 2, layout.nbytes), 0xFF, dtype=torch.uint8)
    codec.encode(layout, pages, torch.tensor([1, 2]), torch.tensor([3, 0]), torch.ones(2, 2, 8))
    out = torch.empty(3, 2, 4, 8)
    codec.decode(layout, pages, out)
    written = ~out.isnan().any(-1)
    assert written.nonzero().tolist() == [[1, 0, 3], [1, 1, 3], [2, 0, 0], [2, 1, 0]]
    assert bool((out[written] == 1).all())


@every_format
@pytest.mark.parametrize("n_rows", [0, 1, 3])
def test_scrubbing_clears_everything_from_a_row_on(name: str, n_rows: int) -> None:
    codec = get_codec(name)
    values = drawn(4, 2, 8, generator=torch.Generator().manual_seed(2))
    layout, pages = codec.layout(8, 4), stored(codec, values)
    codec.scrub(layout, pages, n_rows)
    assert torch.equal(pages, torch.cat([stored(codec, values[:n_rows])]) if n_rows else torch.zeros_like(pages))


@every_format
def test_pages_are_numbers_of_their_own_dtype_alone(name: str) -> None:
    codec, values = get_codec(name), torch.ones(4, 2, 8)
    layout, pages = codec.layout(8, 4), stored(get_codec(name), values)
    for dtype in TORCH_DTYPES.values():
        typed = codec.typed(layout, pages, dtype)
        assert (typed is not None) == (dtype == TORCH_DTYPES[name])
        if typed is not None:
            typed[0, 0, 0, 0] = 5  # the pages themselves, not a copy
            assert typed.shape == (1, 2, 4, 8)
            again = codec.typed(layout, pages, dtype)
            assert again is not None
            assert float(again[0, 0, 0, 0]) == 5


def test_pages_are_aligned() -> None:
    for name, dtype in TORCH_DTYPES.items():
        layout = get_codec(name).layout(7, 3)
        assert layout.nbytes % 64 == 0
        assert layout.payload_bytes == 21 * dtype.itemsize


def test_formats_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from stratakv.codecs import registry

    monkeypatch.setattr(registry, "_factories", dict(registry._factories))
    with pytest.raises(ConfigurationError, match="unknown format 'fp31'; accepted are fp32"):
        get_codec("fp31")

    class Mine(Float32):
        name = "mine"

    register_codec("mine", Mine)
    assert isinstance(get_codec("mine"), Mine)
    assert "mine" in codec_names()
    taken: Any = pytest.raises(ConfigurationError, match="taken")
    with taken:
        register_codec("mine", Mine)
