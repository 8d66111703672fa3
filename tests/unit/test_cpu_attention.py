"""The C++ kernels, in every instruction set of this processor, against the reference in double precision."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from attention_checks import FORMATS, assert_right, queries, threads
from torch import Tensor

from stratakv.attention import AttentionBackend, AttentionOptions, CpuBackend, ReferenceBackend, backend_for, cpu
from stratakv.blocks.batch import SequenceBatch
from stratakv.blocks.geometry import build_spec
from stratakv.blocks.memory import Memory
from stratakv.blocks.view import KVView
from stratakv.errors import ConfigurationError, StateError
from stratakv.extension import instruction_sets, is_built
from stratakv.policies import Window
from stratakv.spec import LayerSpec
from stratakv.testing.views import make_view, view_of

pytestmark = pytest.mark.skipif(not is_built(), reason="installed without the extension, on purpose or for want of g++")

every_isa = pytest.mark.parametrize("isa", instruction_sets())


@pytest.fixture(autouse=True)
def decode_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many queries there are."""
    monkeypatch.setattr(cpu, "PREFILL_QUERIES", 1 << 30)


@every_isa
@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256), (5, 3)])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16])
def test_head_dims_and_groups(isa: str, dims: tuple[int, int], group: int) -> None:
    view = make_view(1, 2, 77, 1, k_dim=dims[0], v_dim=dims[1], block_tokens=16)
    assert_right(isa, view, queries(1, 2 * group, 1, dims[0]), AttentionOptions(dims[0] ** -0.5))


@every_isa
@pytest.mark.parametrize("block_tokens", [1, 16, 64, 100, 256])
@pytest.mark.parametrize("n_rows", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300])
def test_lengths_around_the_edges_of_blocks(isa: str, block_tokens: int, n_rows: int) -> None:
    view = make_view(2, 3, n_rows, 1, k_dim=16, v_dim=24, block_tokens=block_tokens)
    assert_right(isa, view, queries(2, 9, 1, 16), AttentionOptions(0.25))


@every_isa
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("query_dtype", FORMATS.values())
def test_formats_and_dtypes(isa: str, format_name: str, query_dtype: torch.dtype) -> None:
    view = make_view(2, 2, 90, 3, k_dim=40, v_dim=72, block_tokens=32, format=format_name)
    assert_right(isa, view, queries(2, 6, 3, 40).to(query_dtype), AttentionOptions(0.2))


@every_isa
@pytest.mark.parametrize("n_new", [1, 3, 64, 65, 130])
@pytest.mark.parametrize("policy", [None, Window(7), Window(20, sinks=3), Window((5, 30))])
def test_several_queries_see_what_they_may(isa: str, n_new: int, policy: Window | None) -> None:
    view = make_view(2, 2, 150, n_new, k_dim=16, v_dim=16, block_tokens=8, policy=policy)
    for options in (AttentionOptions(0.3), AttentionOptions(0.3, causal=False)):
        assert_right(isa, view, queries(2, 4, n_new, 16), options)


@every_isa
@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
def test_a_head_that_threads_share_is_merged(isa: str, n_threads: int) -> None:
    with threads(n_threads):
        for n_sequences, n_kv_heads in ((1, 1), (1, 3), (3, 2)):
            view = make_view(n_sequences, n_kv_heads, 2000, 1, k_dim=64, v_dim=64, block_tokens=64, format="fp16")
            assert_right(isa, view, queries(n_sequences, 3 * n_kv_heads, 1, 64), AttentionOptions(0.125))


@every_isa
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_masks_hide_what_they_say(isa: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    see = torch.rand(*shape, 3, 90, generator=torch.Generator().manual_seed(6)) < 0.5
    see[:, :, 1] = False  # a query that sees nothing
    mask = see if dtype == torch.bool else torch.zeros(see.shape, dtype=dtype).masked_fill(~see, torch.finfo(dtype).min)
    view = make_view(2, 2, 90, 3, k_dim=16, v_dim=16, block_tokens=16)
    for options in (
        AttentionOptions(0.3, mask=mask),
        AttentionOptions(0.3, mask=mask, softcap=2.0, sinks=torch.randn(4)),
    ):
        assert_right(isa, view, queries(2, 4, 3, 16), options)


@every_isa
def test_large_and_small_scores_do_not_overflow(isa: str) -> None:
    view = make_view(1, 2, 100, 1, k_dim=16, v_dim=16, block_tokens=16)
    for scale in (1e-6, 1.0, 300.0):
        assert_right(isa, view, queries(1, 4, 1, 16), AttentionOptions(scale), tolerance=1e-4)


@every_isa
def test_a_weight_below_the_smallest_normal_number_is_none(isa: str) -> None:
    values = torch.ones(1, 1, 40, 16)
    values[:, :, 7] = 1e38
    keys = torch.zeros(1, 1, 40, 16)
    keys[:, :, 7, 0] = -90.0  # exp(-90) is 8e-40
    query = torch.zeros(1, 2, 1, 16)
    query[..., 0] = 1.0
    out, _ = CpuBackend(isa).run(query, view_of(keys, values, 1, block_tokens=16), AttentionOptions(1.0))
    torch.testing.assert_close(out, torch.ones(1, 2, 1, 16), rtol=1e-6, atol=0)


@every_isa
def test_a_number_that_is_none_comes_out(isa: str) -> None:
    view = make_view(1, 2, 40, 1, k_dim=16, v_dim=16, block_tokens=16)
    query = queries(1, 4, 1, 16)
    query[0, 1] = torch.nan
    query[0, 2, 0, 3] = torch.inf
    out, lse = CpuBackend(isa).run(query, view, AttentionOptions(0.3))
    for head in (1, 2):
        assert out[0, head].isnan().all()
        assert lse[0, head].isnan().all()
    assert torch.isfinite(out[0, [0, 3]]).all()


@pytest.mark.parametrize("backend", [CpuBackend, ReferenceBackend])
@pytest.mark.parametrize(
    ("shape", "offset"), [((1, 1, 1, 39), 0), ((1, 1, 1, 40), 1), ((1, 1, 2, 40), 0), ((3, 1, 1, 40), 0)]
)
def test_a_mask_that_does_not_cover_the_rows_is_refused(
    backend: type[AttentionBackend], shape: tuple[int, ...], offset: int
) -> None:
    view = make_view(1, 2, 40, 1, k_dim=16, v_dim=16, block_tokens=16)
    table = torch.zeros(shape)
    for options in (
        AttentionOptions(0.3, mask_offset=offset, mask=table),
        AttentionOptions(0.3, mask_offset=offset, bias=table),
    ):
        with pytest.raises(ConfigurationError, match="mask"):
            backend().run(queries(1, 4, 1, 16), view, options)


@every_isa
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16])
def test_masks_may_lie_in_any_way(isa: str, dtype: torch.dtype) -> None:
    view = make_view(2, 2, 90, 3, k_dim=16, v_dim=16, block_tokens=16)
    wide = torch.rand(2, 4, 180, 6, generator=torch.Generator().manual_seed(6))
    mask = (wide < 0.5 if dtype == torch.bool else wide.to(dtype))[:, :, ::2, ::2].transpose(2, 3)
    for _ in range(5):  # each time in other memory
        assert_right(isa, view, queries(2, 4, 3, 16), AttentionOptions(0.3, mask=mask))
        assert_right(isa, view, queries(2, 4, 3, 16), AttentionOptions(0.3, mask=mask[:1, :1, :1].expand(2, 4, 3, 90)))


@every_isa
def test_a_bias_is_added_and_hides_nothing(isa: str) -> None:
    view = make_view(2, 2, 90, 3, k_dim=16, v_dim=16, block_tokens=16)
    bias = torch.randn(2, 4, 3, 100, generator=torch.Generator().manual_seed(7))
    see = torch.rand(2, 1, 3, 90, generator=torch.Generator().manual_seed(8)) < 0.7
    floats = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)
    lowest = bias.clone()
    lowest[:, 1] = torch.finfo(torch.float32).min
    for options in (
        AttentionOptions(0.3, bias=bias),
        AttentionOptions(0.3, bias=bias, mask=see),
        AttentionOptions(0.3, bias=bias, mask=floats),
        AttentionOptions(0.3, bias=lowest),
    ):
        assert_right(isa, view, queries(2, 4, 3, 16), options, tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_and_device_of_the_process_are_nothing_to_the_kernels(dtype: torch.dtype) -> None:
    view = make_view(2, 2, 900, 70, k_dim=16, v_dim=16, block_tokens=16)
    query, options = queries(2, 4, 70, 16), AttentionOptions(0.3)
    expected = CpuBackend().run(query, view, options)
    again = make_view(2, 2, 900, 70, k_dim=16, v_dim=16, block_tokens=16)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = CpuBackend().run(query, again, options)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", [CpuBackend, ReferenceBackend])
def test_what_does_not_fit_the_queries_is_refused(backend: type[AttentionBackend]) -> None:
    view = make_view(1, 2, 40, 1, k_dim=16, v_dim=16, block_tokens=16)
    for query, options in (
        (queries(1, 4, 7, 16), AttentionOptions(0.3)),
        (queries(2, 4, 1, 16), AttentionOptions(0.3)),
        (queries(1, 3, 1, 16), AttentionOptions(0.3)),
        (queries(1, 4, 1, 8), AttentionOptions(0.3)),
        (queries(1, 4, 1, 16), AttentionOptions(0.3, sinks=torch.ones(1))),
        (queries(1, 4, 1, 16), AttentionOptions(0.3, mask=torch.zeros(1, 1, 1, 40, device="meta"))),
    ):
        with pytest.raises(ConfigurationError):
            backend().run(query, view, options)


def test_dtypes_and_devices_that_the_kernels_do_not_take_are_refused() -> None:
    view = make_view(1, 2, 40, 1, k_dim=16, v_dim=16, block_tokens=16)
    with pytest.raises(ConfigurationError, match="float64"):
        CpuBackend().run(queries(1, 4, 1, 16).double(), view, AttentionOptions(0.3))
    with pytest.raises(ConfigurationError, match="meta"):
        CpuBackend().run(queries(1, 4, 1, 16).to("meta"), view, AttentionOptions(0.3))


@pytest.mark.parametrize("backend", [CpuBackend, ReferenceBackend])
def test_a_view_whose_memory_was_given_back_is_refused(backend: type[AttentionBackend]) -> None:
    layer = LayerSpec(0, 2, 16, 16)
    memory = Memory(build_spec([layer], k_format="fp32", v_format="fp32", block_tokens=16), device=torch.device("cpu"))
    batch = SequenceBatch(memory)
    batch.begin(1, 40)
    view = batch.write(0, torch.zeros(1, 2, 40, 16), torch.zeros(1, 2, 40, 16))
    batch.reset()
    with pytest.raises(StateError, match="moved"):
        backend().run(queries(1, 4, 40, 16), view, AttentionOptions(0.3))


def test_python_threads_do_not_disturb_each_other() -> None:
    backend = CpuBackend()
    cases = []
    for seed, dim in enumerate((16, 40, 64, 128)):
        view = make_view(1, 2, 700, 1, k_dim=dim, v_dim=dim, block_tokens=16, seed=seed)
        query, options = queries(1, 4 + 2 * seed, 1, dim, seed), AttentionOptions(0.1 + seed)
        cases.append((query, view, options, backend.run(query, view, options)[0]))

    def repeat(case: tuple[Tensor, KVView, AttentionOptions, Tensor]) -> bool:
        query, view, options, expected = case
        return all(torch.allclose(backend.run(query, view, options)[0], expected, atol=1e-5) for _ in range(300))

    with ThreadPoolExecutor(len(cases)) as pool:
        assert all(pool.map(repeat, cases))


def test_threads_attend_with_caches_of_their_own() -> None:
    """In each step the threads have other plans than the step before, and let go of those."""
    backend = CpuBackend()

    def decode(seed: int) -> bool:
        rows = torch.randn(1, 2, 90, 16, generator=torch.Generator().manual_seed(seed))
        spec = build_spec([LayerSpec(0, 2, 16, 16)], k_format="fp32", v_format="fp32", block_tokens=4)
        batch = SequenceBatch(Memory(spec, device=torch.device("cpu")))
        query, options = queries(1, 4, 1, 16, seed), AttentionOptions(0.3)
        for t in range(rows.shape[2]):
            batch.begin(1, 1)
            view = batch.write(0, rows[:, :, t : t + 1], -rows[:, :, t : t + 1])
            found, _ = backend.run(query, view, options)
            expected, _ = ReferenceBackend().run(query, view, options)
            if not torch.allclose(found, expected, atol=1e-5):
                return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(decode, range(18)))


def test_the_default_dtype_does_not_reach_the_kernels() -> None:
    view = make_view(2, 2, 19, 3, k_dim=8, v_dim=8)
    mask = torch.rand(1, 1, 3, 19, generator=torch.Generator().manual_seed(0)) < 0.7
    bias = torch.randn(1, 1, 3, 19, generator=torch.Generator().manual_seed(1))
    for options in (AttentionOptions(0.3, mask=mask, bias=bias), AttentionOptions(0.3, mask=mask, sinks=torch.ones(4))):
        query = queries(2, 4, 3, 8)
        expected, _ = ReferenceBackend().run(query, view, options)
        torch.set_default_dtype(torch.float64)
        try:
            found, _ = CpuBackend().run(query, view, options)
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(found, expected)


def test_windows_beyond_32_bits_see_all() -> None:
    policy = Window(2**31, sinks=2**40)
    view = make_view(1, 2, 40, 1, k_dim=16, v_dim=16, block_tokens=16, policy=policy)
    plain = make_view(1, 2, 40, 1, k_dim=16, v_dim=16, block_tokens=16)
    query, options = queries(1, 4, 1, 16), AttentionOptions(0.3)
    assert torch.equal(CpuBackend().run(query, view, options)[0], CpuBackend().run(query, plain, options)[0])


def test_a_view_of_before_is_refused() -> None:
    view = make_view(1, 2, 40, 1, k_dim=16, v_dim=16, block_tokens=16)
    view.parts[0].arena.version += 1
    with pytest.raises(StateError, match="moved"):
        CpuBackend().run(queries(1, 4, 1, 16), view, AttentionOptions(0.3))


def test_the_best_backend_that_serves_a_call_is_chosen() -> None:
    view = make_view(1, 2, 40, 1, k_dim=16, v_dim=16, block_tokens=16)
    assert backend_for(view, AttentionOptions(0.3), torch.float32).name == "cpu"
    assert backend_for(view, AttentionOptions(0.3), torch.float64).name == "reference"


@every_isa
def test_numbers_that_are_stored_with_the_other_sign_are_read_as_what_they_are(isa: str) -> None:
    view, query = make_view(1, 1, 20, 20, k_dim=8, v_dim=8, block_tokens=16), queries(1, 1, 20, 8)
    table = torch._neg_view(queries(1, 1, 20, 20))
    sinks = torch._neg_view(torch.tensor([2.0]))
    assert_right(isa, view, torch._neg_view(query), AttentionOptions(0.3))
    for options in (
        AttentionOptions(0.3, mask=table),
        AttentionOptions(0.3, bias=table),
        AttentionOptions(0.3, sinks=sinks),
    ):
        assert_right(isa, view, query, options)


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="sse9"):
        CpuBackend("sse9")
    monkeypatch.setenv("STRATAKV_ISA", "generic")
    assert CpuBackend().isa == "generic"


def test_without_the_extension_there_is_one_warning_and_the_reference() -> None:
    code = (
        "import sys, warnings; sys.modules['stratakv._kernels'] = None\n"
        "import stratakv.attention as a\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    names = [b.name for b in a.backends()] + [b.name for b in a.backends()]\n"
        "assert names == ['reference', 'reference'], names\n"
        "assert [str(w.message)[:8] for w in seen] == ['stratakv'], seen\n"
    )
    done: Any = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
