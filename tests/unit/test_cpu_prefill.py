"""The kernel for prompts, in every instruction set of this processor, against the reference in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_checks import FORMATS, assert_right, queries, threads
from torch import Tensor

from stratakv import extension
from stratakv.attention import AttentionOptions, CpuBackend, ReferenceBackend, cpu
from stratakv.extension import instruction_sets, is_built
from stratakv.policies import Window
from stratakv.testing.views import make_view, view_of

has_tiles = "amx" in instruction_sets()
pytestmark = pytest.mark.skipif(not is_built(), reason="installed without the extension, on purpose or for want of g++")

every_isa = pytest.mark.parametrize("isa", instruction_sets())
# AMX has kernels of its own, for pages of bf16 and for all others that have fewer bits than fp32.
with_tiles = [("amx", "bf16"), ("amx", "fp16")] if has_tiles else []
every_kernel = pytest.mark.parametrize(
    ("isa", "format_name"), [*((isa, "fp32") for isa in instruction_sets()), *with_tiles]
)


@pytest.fixture(autouse=True)
def prefill_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few queries there are."""
    monkeypatch.setattr(cpu, "PREFILL_QUERIES", 0)


@every_kernel
@pytest.mark.parametrize(
    "dims", [(32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256), (5, 3)]
)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12, 16])
def test_head_dims_and_groups(isa: str, format_name: str, dims: tuple[int, int], group: int) -> None:
    view = make_view(1, 2, 150, 41, k_dim=dims[0], v_dim=dims[1], block_tokens=16, format=format_name)
    assert_right(isa, view, queries(1, 2 * group, 41, dims[0]), AttentionOptions(dims[0] ** -0.5))


@every_kernel
@pytest.mark.parametrize("n_new", [1, 2, 5, 6, 7, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 192, 193, 300])
@pytest.mark.parametrize("n_earlier", [0, 1, 7, 100, 128, 500])
def test_lengths_around_the_edges_of_tiles(isa: str, format_name: str, n_new: int, n_earlier: int) -> None:
    view = make_view(1, 2, n_earlier + n_new, n_new, k_dim=16, v_dim=24, block_tokens=64, format=format_name)
    assert_right(isa, view, queries(1, 4, n_new, 16), AttentionOptions(0.25))


@every_kernel
@pytest.mark.parametrize("block_tokens", [1, 16, 64, 100, 2048])
@pytest.mark.parametrize("n_new", [3, 130])
def test_blocks_of_any_size(isa: str, format_name: str, block_tokens: int, n_new: int) -> None:
    view = make_view(2, 3, 70 + n_new, n_new, k_dim=16, v_dim=24, block_tokens=block_tokens, format=format_name)
    assert_right(isa, view, queries(2, 9, n_new, 16), AttentionOptions(0.25))


@every_isa
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("query_dtype", FORMATS.values())
@pytest.mark.parametrize("dims", [(40, 72), (5, 3)])
def test_formats_and_dtypes(isa: str, format_name: str, query_dtype: torch.dtype, dims: tuple[int, int]) -> None:
    view = make_view(2, 2, 190, 70, k_dim=dims[0], v_dim=dims[1], block_tokens=32, format=format_name)
    assert_right(isa, view, queries(2, 6, 70, dims[0]).to(query_dtype), AttentionOptions(0.2))


@every_kernel
@pytest.mark.parametrize("n_new", [1, 3, 64, 65, 200])
@pytest.mark.parametrize(
    "policy", [None, Window(1), Window(7), Window(20, sinks=3), Window(130, sinks=140), Window((5, 30))]
)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_several_queries_see_what_they_may(
    isa: str, format_name: str, n_new: int, policy: Window | None, softcap: float | None
) -> None:
    view = make_view(2, 2, 430, n_new, k_dim=16, v_dim=16, block_tokens=8, policy=policy, format=format_name)
    for causal in (True, False):
        assert_right(isa, view, queries(2, 4, n_new, 16), AttentionOptions(0.3, causal=causal, softcap=softcap))


@every_isa
@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("format_name", FORMATS)
def test_threads_share_the_work(isa: str, n_threads: int, format_name: str) -> None:
    with threads(n_threads):
        for n_sequences, n_kv_heads, n_new in ((1, 1, 1), (1, 1, 300), (1, 3, 77), (3, 2, 200)):
            view = make_view(n_sequences, n_kv_heads, 99 + n_new, n_new, k_dim=32, v_dim=32, format=format_name)
            assert_right(isa, view, queries(n_sequences, 3 * n_kv_heads, n_new, 32), AttentionOptions(0.125))


@every_isa
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 70), (2, 1, 70), (1, 4, 70), (2, 4, 70), (2, 1, 1)])
@pytest.mark.parametrize("policy", [None, Window(50, sinks=5)])
def test_masks_hide_what_they_say(
    isa: str, dtype: torch.dtype, shape: tuple[int, int, int], policy: Window | None
) -> None:
    see = torch.rand(*shape, 290, generator=torch.Generator().manual_seed(6)) < 0.5
    see[:, :, 1:2] = False  # a query that sees nothing
    see[:, :, 3:20, 30:] = False  # some that see nothing of later tiles
    see[:, :, 20:30, :200] = False
    mask = see if dtype == torch.bool else torch.zeros(see.shape, dtype=dtype).masked_fill(~see, torch.finfo(dtype).min)
    view = make_view(2, 2, 290, 70, k_dim=16, v_dim=16, block_tokens=16, policy=policy)
    for options in (
        AttentionOptions(0.3, mask=mask),
        AttentionOptions(0.3, mask=mask, softcap=2.0, sinks=torch.randn(4)),
    ):
        assert_right(isa, view, queries(2, 4, 70, 16), options)


@every_isa
def test_a_mask_with_strides_is_read_as_it_is(isa: str) -> None:
    see = torch.rand(1, 1, 290, 70, generator=torch.Generator().manual_seed(6)) < 0.5
    view = make_view(2, 2, 290, 70, k_dim=16, v_dim=16, block_tokens=16)
    for mask in (see.transpose(2, 3), see.float().log().transpose(2, 3), torch.ones(1, 1, 70, 1).expand(1, 1, 70, 290)):
        assert_right(isa, view, queries(2, 4, 70, 16), AttentionOptions(0.3, mask=mask))


@every_kernel
@pytest.mark.parametrize("causal", [True, False])
def test_a_bias_and_sinks_take_part(isa: str, format_name: str, causal: bool) -> None:
    bias = 3 * torch.randn(1, 6, 70, 290, generator=torch.Generator().manual_seed(6))
    view = make_view(2, 2, 290, 70, k_dim=16, v_dim=16, block_tokens=16, format=format_name)
    for added in (bias, None):
        options = AttentionOptions(0.3, sinks=bias[0, :, 0, 0], causal=causal, bias=added)
        assert_right(isa, view, queries(2, 6, 70, 16), options)


@every_isa
@pytest.mark.parametrize("policy", [None, Window(60, sinks=9)])
@pytest.mark.parametrize("n_new", [1, 70])
def test_slopes_are_a_bias_that_the_kernel_makes(
    isa: str, policy: Window | None, n_new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])

    class Sloped(extension._kernels.Step):  # type: ignore[misc]  # the module is looked up by name
        def set_rules(self, *rules: Any) -> None:
            super().set_rules(*rules[:5], slopes.data_ptr(), rules[6])

    view = make_view(2, 2, 290, n_new, k_dim=16, v_dim=16, block_tokens=16, policy=policy)
    query = queries(2, 4, n_new, 16)
    distance = torch.arange(290)[None, :] - torch.arange(290 - n_new, 290)[:, None]
    bias = slopes[None, :, None, None] * distance
    expected, expected_lse = ReferenceBackend().run(query.double(), view, AttentionOptions(0.3, bias=bias))
    monkeypatch.setattr(extension._kernels, "Step", Sloped)
    out, lse = CpuBackend(isa).run(query, view, AttentionOptions(0.3))
    torch.testing.assert_close(out.double(), expected, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=3e-6, atol=1e-5)


@every_kernel
@pytest.mark.parametrize("softcap", [0.1, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("scale", [1e-4, 0.25, 20.0])
def test_softcap_is_exact_for_small_and_large_scores(isa: str, format_name: str, softcap: float, scale: float) -> None:
    view = make_view(1, 2, 140, 40, k_dim=16, v_dim=16, block_tokens=16, format=format_name)
    tolerance = 3e-6 * max(1.0, min(softcap, 20 * scale) / 4)  # of the scores themselves, in fp32
    assert_right(isa, view, queries(1, 4, 40, 16), AttentionOptions(scale, softcap=softcap), tolerance)


@every_kernel
def test_large_and_small_scores_do_not_overflow(isa: str, format_name: str) -> None:
    view = make_view(1, 2, 200, 30, k_dim=16, v_dim=16, block_tokens=16, format=format_name)
    for scale in (1e-6, 1.0, 300.0):
        tolerance = 1e-4 if format_name == "fp32" else 1e-3  # scores of thousands lose what they have lost of queries
        assert_right(isa, view, queries(1, 4, 30, 16), AttentionOptions(scale), tolerance)


@every_kernel
@pytest.mark.parametrize("score", [1e3, 1e4, 1e5, 1e6])
def test_rows_apart_weigh_what_their_scores_say_at_any_height(isa: str, format_name: str, score: float) -> None:
    keys, values = torch.zeros(1, 1, 384, 2), torch.zeros(1, 1, 384, 1)  # which a kernel does not take all at once
    keys[..., 0] = torch.tensor(score).bfloat16()
    keys[:, :, 192:, 1] = 0.25
    values[:, :, 192:] = 1
    view = view_of(keys, values, 384, block_tokens=64, format=format_name)
    assert_right(isa, view, torch.ones(1, 1, 384, 2), AttentionOptions(1.0), tolerance=1e-6)


@pytest.mark.skipif(not has_tiles, reason="this processor has no AMX, whose queries are split into two numbers")
@pytest.mark.parametrize("size", [3.3e38, 3.4e38])
def test_queries_near_the_largest_number_are_numbers(size: float) -> None:
    keys, values = torch.zeros(1, 1, 40, 2), torch.ones(1, 1, 40, 1)
    keys[..., 20:, 0] = 1
    values[..., 20:, :] = 2
    view = view_of(keys, values, 40, block_tokens=64, format="bf16")
    out, _ = CpuBackend("amx").run(torch.full((1, 1, 40, 2), size), view, AttentionOptions(1e-38, causal=False))
    share = torch.tensor(size * 1e-38).sigmoid()
    torch.testing.assert_close(out.flatten(), (1 + share).expand(40), rtol=0.02, atol=0)


@every_isa
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_number_that_is_none_comes_out_and_stays_with_its_query(isa: str, softcap: float | None) -> None:
    view = make_view(1, 2, 240, 30, k_dim=16, v_dim=16, block_tokens=16)
    query = queries(1, 4, 30, 16)
    broken: list[tuple[int, int]] = [(1, 0), (1, 29), (2, 7)]
    for head, token in broken:
        query[0, head, token] = torch.nan
    out, lse = CpuBackend(isa).run(query, view, AttentionOptions(0.3, softcap=softcap))
    expected, expected_lse = ReferenceBackend().run(query.double(), view, AttentionOptions(0.3, softcap=softcap))
    assert expected_lse.isnan().sum() == len(broken)
    torch.testing.assert_close(out.double(), expected, rtol=3e-6, atol=3e-6, equal_nan=True)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=3e-6, atol=1e-5, equal_nan=True)


@every_isa
def test_an_infinite_query_gives_no_number(isa: str) -> None:
    view = make_view(1, 2, 240, 30, k_dim=16, v_dim=16, block_tokens=16)
    query = queries(1, 4, 30, 16)
    query[0, 2, 9, 3] = torch.inf
    out, lse = CpuBackend(isa).run(query, view, AttentionOptions(0.3))
    assert out[0, 2, 9].isnan().all()
    assert lse[0, 2, 9].isnan()
    assert int(out.isnan().sum()) == out.shape[3]


@every_isa
def test_queries_and_outputs_with_strides(isa: str) -> None:
    view = make_view(2, 2, 150, 50, k_dim=16, v_dim=24, block_tokens=16)
    wide: Tensor = queries(2, 50, 4, 40)[..., 8:24].transpose(1, 2)
    assert_right(isa, view, wide, AttentionOptions(0.25))
    assert_right(isa, view, queries(2, 4, 16, 50).transpose(2, 3), AttentionOptions(0.25))


@every_isa
def test_both_kernels_say_the_same(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    view = make_view(2, 2, 250, 90, k_dim=64, v_dim=64, block_tokens=16, format="bf16")
    query = queries(2, 6, 90, 64)
    prefill = CpuBackend(isa).run(query, view, AttentionOptions(0.125))
    monkeypatch.setattr(cpu, "PREFILL_QUERIES", 1 << 30)
    for a, b in zip(prefill, CpuBackend(isa).run(query, view, AttentionOptions(0.125)), strict=True):
        torch.testing.assert_close(a, b, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize(
    ("n_sequences", "group", "n_new", "n_threads", "expected"),
    [
        (1, 4, 5, 1, "decode"),
        (1, 4, 6, 1, "prefill"),
        (8, 4, 5, 1, "decode"),  # more heads do not make up for queries that share nothing
        (1, 4, 6, 2, "decode"),  # two threads with two heads: one share each
        (1, 4, 12, 2, "prefill"),
        (4, 4, 6, 2, "prefill"),
    ],
)
def test_the_kernel_depends_on_the_queries_of_a_head_and_a_thread(
    n_sequences: int, group: int, n_new: int, n_threads: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    class Recording(extension._kernels.Step):  # type: ignore[misc]  # the module is looked up by name
        def run(self, *arguments: Any) -> None:
            called.append("prefill" if self.is_prompt() else "decode")

    monkeypatch.setattr(cpu, "PREFILL_QUERIES", 24)
    monkeypatch.setattr(extension._kernels, "Step", Recording)
    view = make_view(n_sequences, 2, 40, n_new, k_dim=16, v_dim=16, block_tokens=16)
    with threads(n_threads):
        CpuBackend().run(queries(n_sequences, 2 * group, n_new, 16), view, AttentionOptions(0.3))
    assert called == [expected]
