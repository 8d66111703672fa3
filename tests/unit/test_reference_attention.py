"""The reference attention, against a loop in fp64 that follows the definition word by word."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stratakv.attention import (
    AttentionBackend,
    AttentionOptions,
    CpuBackend,
    ReferenceBackend,
    apply_sinks,
    merge_states,
)
from stratakv.attention import reference as reference_module
from stratakv.attention.reference import attend_tensors
from stratakv.blocks.view import KVPart, KVView
from stratakv.errors import ConfigurationError
from stratakv.extension import is_built
from stratakv.policies import Window
from stratakv.spec import Retention
from stratakv.testing.views import drawn, make_view

SCALE = 0.37
HIDDEN = torch.finfo(torch.float32).min

BACKENDS = [ReferenceBackend(), *([CpuBackend()] if is_built() else [])]


def naive(query: Tensor, view: KVView, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """out and lse in fp64, one query head and query at a time."""
    n_sequences, n_query_heads, n_new, _ = query.shape
    out = torch.zeros(n_sequences, n_query_heads, n_new, view.v_dim, dtype=torch.float64)
    lse = torch.full((n_sequences, n_query_heads, n_new), -torch.inf, dtype=torch.float64)
    group = n_query_heads // view.n_kv_heads
    for part in view.parts:
        keys, values = (x.double() for x in part.read(torch.float32))
        rows = part.positions().tolist()
        for b in range(n_sequences):
            for at, head in enumerate(part.heads):
                for h in range(head * group, (head + 1) * group):
                    for i in range(n_new):
                        scores = torch.tensor(
                            [
                                score(
                                    query[b, h, i].double(),
                                    keys[b, at, r],
                                    options,
                                    part.retention,
                                    (b, h, i, view.seen_tokens + i, p),
                                )
                                for r, p in enumerate(rows)
                            ],
                            dtype=torch.float64,
                        )
                        lse[b, h, i] = scores.logsumexp(0)
                        sink = options.sinks[h].double() if options.sinks is not None else torch.tensor(-torch.inf)
                        total = torch.logaddexp(lse[b, h, i], sink)
                        if total > -torch.inf:
                            out[b, h, i] = (scores - total).exp() @ values[b, at]
    return out, lse


def score(
    query: Tensor,
    key: Tensor,
    options: AttentionOptions,
    retention: Retention | None,
    index: tuple[int, int, int, int, int],
) -> float:
    b, h, i, at, position = index
    value = float(query @ key) * options.scale
    if options.softcap is not None:
        value = math.tanh(value / options.softcap) * options.softcap
    if options.bias is not None:
        value += float(entry(options.bias, b, h, i, position - options.mask_offset))
    if options.mask is not None:
        masked = entry(options.mask, b, h, i, position - options.mask_offset)
        if masked.dtype == torch.bool:
            value = value if masked else -math.inf
        else:
            value = value + float(masked) if float(masked) > HIDDEN / 4 else -math.inf
    elif options.causal and position > at:
        value = -math.inf
    if retention is not None and retention.window is not None:
        value = value if position > at - retention.window or position < retention.sinks else -math.inf
    return value


def entry(table: Tensor, b: int, h: int, i: int, column: int) -> Tensor:
    """The entry for one sequence, head, query and column, where an axis of length 1 stands for all."""
    at = [index if size > 1 else 0 for index, size in zip((b, h, i), table.shape[:3], strict=True)]
    return table[(*at, column)]


def queries(view: KVView, n_query_heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return drawn(view.n_sequences, n_query_heads, view.n_new, view.k_dim, generator=generator).to(dtype)


def assert_right(query: Tensor, view: KVView, options: AttentionOptions, tolerance: float = 2e-6) -> None:
    out, lse = ReferenceBackend().run(query, view, options)
    expected, expected_lse = naive(query, view, options)
    assert out.dtype == query.dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=tolerance, atol=tolerance)


def table(*shape: int, seed: int = 6) -> Tensor:
    return drawn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n_query_heads", "n_kv_heads"), [(4, 4), (4, 2), (6, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize(("k_dim", "v_dim"), [(8, 8), (12, 5), (7, 13), (1, 1)])
@pytest.mark.parametrize(("n_rows", "n_new"), [(1, 1), (9, 1), (9, 4), (9, 9)])
def test_heads_and_dims(
    *, n_query_heads: int, n_kv_heads: int, k_dim: int, v_dim: int, n_rows: int, n_new: int
) -> None:
    view = make_view(2, n_kv_heads, n_rows, n_new, k_dim=k_dim, v_dim=v_dim)
    assert_right(queries(view, n_query_heads), view, AttentionOptions(SCALE))


@pytest.mark.parametrize("block_tokens", [1, 2, 3, 16, 2048])
def test_block_sizes(block_tokens: int) -> None:
    view = make_view(2, 2, 21, 5, block_tokens=block_tokens)
    assert_right(queries(view, 4), view, AttentionOptions(SCALE))


COMBINATIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "not causal": {"causal": False},
    "softcap": {"softcap": 1.3},
    "sinks": {"sinks": table(4)},
    "bias": {"bias": table(2, 4, 5, 11)},
    "bias for all": {"bias": table(1, 1, 1, 11)},
    "bool mask": {"mask": table(2, 4, 5, 11) > -0.5},
    "bool mask for all heads": {"mask": table(2, 1, 5, 11) > -0.5},
    "bool mask for all": {"mask": table(1, 1, 5, 11) > 0},
    "float mask": {"mask": torch.zeros(2, 1, 5, 11).masked_fill(table(2, 1, 5, 11) > 0, HIDDEN)},
    "float mask with infinity": {"mask": torch.zeros(2, 4, 5, 11).masked_fill(table(2, 4, 5, 11) > 0, -torch.inf)},
    "float mask with numbers": {"mask": table(2, 4, 5, 11)},
    "nothing seen": {"mask": torch.zeros(2, 1, 5, 11, dtype=torch.bool)},
    "nothing seen, sinks": {"mask": torch.zeros(2, 1, 5, 11, dtype=torch.bool), "sinks": table(4)},
    "one row empty": {"mask": torch.ones(2, 1, 5, 11).bool().index_fill(2, torch.tensor([1]), value=False)},
    "all": {"mask": table(2, 4, 5, 11) > 0, "bias": table(2, 4, 5, 11, seed=7), "softcap": 2.0, "sinks": table(4)},
}


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("policy", [None, Window(4), Window((2, 6), sinks=2)], ids=["full", "window", "heads"])
def test_masks_bias_softcap_and_sinks(name: str, policy: Window | None) -> None:
    view = make_view(2, 2, 11, 5, policy=policy)
    assert_right(queries(view, 4), view, AttentionOptions(SCALE, **COMBINATIONS[name]))


@pytest.mark.parametrize("name", COMBINATIONS)
def test_queries_taken_in_portions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    view = make_view(2, 2, 11, 5)
    whole = ReferenceBackend().run(queries(view, 4), view, AttentionOptions(SCALE, **COMBINATIONS[name]))
    monkeypatch.setattr(reference_module, "SCORE_BYTES", 4 * 2 * 4 * 11 * 2)  # two queries at a time
    parts = ReferenceBackend().run(queries(view, 4), view, AttentionOptions(SCALE, **COMBINATIONS[name]))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    view = make_view(2, 2, 11, 5)
    for mask in (torch.zeros(1, 1, 5, 11, dtype=torch.bool), torch.full((1, 1, 5, 11), HIDDEN)):
        out, lse = ReferenceBackend().run(queries(view, 4), view, AttentionOptions(SCALE, mask=mask))
        assert bool((out == 0).all())
        assert bool(lse.isneginf().all())


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_a_query_that_sees_nothing_gives_zeros_whatever_the_sinks(backend: AttentionBackend) -> None:
    view = make_view(1, 2, 11, 5)
    options = AttentionOptions(
        SCALE, mask=torch.zeros(1, 1, 5, 11, dtype=torch.bool), sinks=torch.full((4,), -torch.inf)
    )
    out, lse = backend.run(queries(view, 4), view, options)
    assert bool((out == 0).all())
    assert bool(lse.isneginf().all())


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_what_hides_is_the_same_everywhere(backend: AttentionBackend, dtype: torch.dtype) -> None:
    """Also in fp64, whose masks are often filled with the smallest number of fp32."""
    view = make_view(1, 2, 11, 5)
    smallest = torch.finfo(torch.float16 if dtype == torch.float16 else torch.float32).min
    options = AttentionOptions(SCALE, mask=torch.full((1, 1, 5, 11), smallest, dtype=dtype))
    out, lse = backend.run(queries(view, 4), view, options)
    assert bool((out == 0).all())
    assert bool(lse.isneginf().all())


def test_large_scores_do_not_overflow() -> None:
    view = make_view(1, 2, 11, 5)
    assert_right(queries(view, 4) * 1e4, view, AttentionOptions(SCALE), tolerance=1e-4)


@pytest.mark.parametrize("stored", ["fp32", "bf16", "fp16", "fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_any_stored_format_and_query_dtype(stored: str, dtype: torch.dtype) -> None:
    view = make_view(2, 2, 11, 5, format=stored)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    out, lse = ReferenceBackend().run(queries(view, 4, dtype), view, AttentionOptions(SCALE))
    expected, expected_lse = naive(queries(view, 4, dtype), view, AttentionOptions(SCALE))
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-6)


def test_a_mask_starts_at_its_offset() -> None:
    view = make_view(1, 2, 11, 3, policy=Window(4))
    first = min(int(part.positions()[0]) for part in view.parts)
    assert first > 0
    mask = table(1, 1, 3, 11) > -0.5
    whole = ReferenceBackend().run(queries(view, 4), view, AttentionOptions(SCALE, mask=mask))
    cut = ReferenceBackend().run(
        queries(view, 4), view, AttentionOptions(SCALE, mask=mask[..., first:], mask_offset=first)
    )
    assert torch.equal(whole[0], cut[0])
    assert_right(queries(view, 4), view, AttentionOptions(SCALE, mask=mask[..., first:], mask_offset=first))


@pytest.mark.parametrize("n_columns", [4, 10])
def test_a_mask_that_does_not_reach_all_rows_is_refused(n_columns: int) -> None:
    view = make_view(1, 2, 11, 3)
    mask = torch.ones(1, 1, 3, n_columns, dtype=torch.bool)
    with pytest.raises(ConfigurationError, match="columns"):
        ReferenceBackend().run(queries(view, 4), view, AttentionOptions(SCALE, mask=mask))


@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (2, 3, 5, 8), (1, 4, 5, 8), (4, 5, 8)])
def test_queries_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    view = make_view(2, 2, 11, 5)
    with pytest.raises(ConfigurationError, match="queries"):
        ReferenceBackend().run(torch.zeros(shape), view, AttentionOptions(SCALE))


@pytest.mark.parametrize(
    "options",
    [
        {"mask": torch.ones(1, 1, 5, 11, dtype=torch.int64)},
        {"mask": torch.ones(1, 1, 5, 11, dtype=torch.uint8)},
        {"mask": torch.ones(1, 1, 5, 11).to_sparse()},
        {"mask": torch.ones(1, 1, 5, 11, dtype=torch.float8_e5m2)},
        {"bias": torch.ones(1, 1, 5, 11, dtype=torch.bool)},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_masks_of_other_kinds_are_refused(options: dict[str, Any], backend: AttentionBackend) -> None:
    view = make_view(2, 2, 11, 5)
    with pytest.raises(ConfigurationError, match="mask"):
        backend.run(queries(view, 4), view, AttentionOptions(SCALE, **options))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("hidden", [False, -torch.inf, HIDDEN])
def test_what_is_hidden_stays_hidden_whatever_its_bias(backend: AttentionBackend, hidden: float) -> None:
    view = make_view(1, 2, 11, 5)
    is_hidden = torch.arange(11).expand(1, 1, 5, 11) % 3 == 0
    mask = ~is_hidden if hidden is False else torch.zeros(is_hidden.shape).masked_fill(is_hidden, hidden)
    bias = torch.zeros(1, 1, 5, 11).masked_fill(is_hidden, torch.inf)
    expected, _ = backend.run(queries(view, 4), view, AttentionOptions(SCALE, mask=~is_hidden))
    found, _ = backend.run(queries(view, 4), view, AttentionOptions(SCALE, mask=mask, bias=bias))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("softcap", [0.0, -1.0, float("inf"), float("nan")])
def test_softcaps_that_cap_nothing_are_refused(softcap: float) -> None:
    with pytest.raises(ConfigurationError, match="softcap"):
        AttentionOptions(SCALE, softcap=softcap)


# Parts of a sequence attended apart


def cut_view(view: KVView, start: int, stop: int) -> KVView:
    """The view with rows `[start, stop)` alone."""
    parts = tuple(
        KVPart(
            p.heads,
            p.arena,
            p.member,
            replace(p.plan, n_rows=stop - start, skip=start, runs=((start, stop - start),)),
            None,
        )
        for p in view.parts
    )
    return replace(view, parts=parts)


@pytest.mark.parametrize("cuts", [(0, 4, 11), (0, 1, 2, 11), (0, 9, 11), (0, 8, 11)])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_merged_parts_equal_the_whole(cuts: tuple[int, ...], with_sinks: bool) -> None:
    view = make_view(2, 2, 11, 5, block_tokens=16)
    query, sinks = queries(view, 4), table(4)
    pieces = []
    for start, stop in itertools.pairwise(cuts):
        pieces.append(ReferenceBackend().run(query, cut_view(view, start, stop), AttentionOptions(SCALE)))
    out, lse = merge_states([o for o, _ in pieces], [s for _, s in pieces])
    out = apply_sinks(out, lse, sinks) if with_sinks else out
    options = AttentionOptions(SCALE, sinks=sinks if with_sinks else None)
    expected, expected_lse = ReferenceBackend().run(query, view, options)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-6)


def test_merging_nothing_seen_gives_zeros_and_is_neutral() -> None:
    empty, nothing = torch.zeros(2, 3, 4), torch.full((2, 3), -torch.inf)
    out, lse = merge_states([empty, empty], [nothing, nothing])
    assert bool((out == 0).all())
    assert bool(lse.isneginf().all())
    some, some_lse = table(2, 3, 4), table(2, 3)
    out, lse = merge_states([empty, some], [nothing, some_lse])
    torch.testing.assert_close(out, some)
    torch.testing.assert_close(lse, some_lse)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_plain_tensors_are_attended_as_a_view_is(name: str) -> None:
    view = make_view(2, 2, 11, 5)
    keys, values = view.gather(torch.float32)
    options = AttentionOptions(SCALE, **COMBINATIONS[name])
    expected, _ = ReferenceBackend().run(queries(view, 4), view, options)
    torch.testing.assert_close(attend_tensors(queries(view, 4), keys, values, options), expected)
