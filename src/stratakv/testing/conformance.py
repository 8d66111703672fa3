"""Suites that a part of one's own must pass: `check_codec`, `check_policy`, `check_backend`.

Each takes an instance and raises AssertionError with what is wrong. They test what the library relies on, and nothing
that the interface leaves open.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable

import torch
from torch import Tensor

from stratakv.attention import AttentionBackend, AttentionOptions, ReferenceBackend, merge_states
from stratakv.blocks.view import KVView
from stratakv.codecs import Codec
from stratakv.errors import ConfigurationError
from stratakv.plan import KeepPlan, Run, run_length
from stratakv.policies import RetentionPolicy
from stratakv.spec import PageLayout, Retention
from stratakv.testing.runs import positions, runs_of
from stratakv.testing.views import drawn, make_view

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_codec(
    codec: Codec, *, head_dims: Iterable[int] = (1, 8, 20, 64), block_sizes: Iterable[int] = (1, 4, 7, 64, 100)
) -> None:
    """Check a storage format: layout, round trip, chunking, scrubbing and identity.

    A head dim or block size that the codec's `layout` refuses with ConfigurationError is passed over; all may not be.
    """
    assert type(codec).from_dict(codec.to_dict()).to_dict() == codec.to_dict(), "from_dict(to_dict()) is another codec"
    json.dumps(codec.to_dict())
    n_served = 0
    for head_dim, block_tokens in itertools.product(head_dims, block_sizes):
        try:
            layout = codec.layout(head_dim, block_tokens)
        except ConfigurationError:
            continue
        n_served += 1
        assert (layout.head_dim, layout.block_tokens) == (head_dim, block_tokens)
        assert layout == codec.layout(head_dim, block_tokens), "the layout is not a function of its arguments"
        assert layout.nbytes >= layout.payload_bytes + layout.scale_bytes
        _check_pages(codec, layout)
    assert n_served, "the codec serves none of the head dims and block sizes"


def check_policy(policy: RetentionPolicy, *, n_heads: int = 4, block_tokens: int = 4, n_tokens: int = 60) -> None:
    """Check a retention policy: what it keeps is stored, holds what queries see, and goes back as far as it says."""
    json.dumps(policy.to_dict())
    assert policy.to_dict()["name"] == policy.name
    for retention in {policy.retention(layer, head) for layer in range(2) for head in range(n_heads)}:
        runs: tuple[Run, ...] = ()
        for seen in range(1, n_tokens + 1):
            runs = runs_of([*positions(runs), seen - 1])
            plan = policy.keep(retention, seen, runs, block_tokens)
            if plan is None:
                continue
            _check_plan(plan, retention, seen, runs)
            again = policy.keep(retention, seen, plan.runs, block_tokens)
            assert again is None or run_length(again.runs) <= run_length(plan.runs), "a second call keeps more"
            runs = plan.runs


def check_backend(backend: AttentionBackend, *, tolerance: float = 2e-5) -> None:
    """Check an attention backend against the reference, in every combination that it says it supports.

    `tolerance` is relative to the size of the values, which is about 1.
    """
    n_served = 0
    for heads, dims, block_tokens, n_new in itertools.product(
        ((4, 4), (4, 2), (4, 1)), ((8, 8), (24, 16)), (1, 4, 32), (1, 5)
    ):
        n_query_heads, n_kv_heads = heads
        view = make_view(2, n_kv_heads, 19, n_new, k_dim=dims[0], v_dim=dims[1], block_tokens=block_tokens)
        query = drawn(2, n_query_heads, n_new, dims[0], generator=torch.Generator().manual_seed(1))
        for options in _options(2, n_query_heads, n_new, 19):
            if backend.supports(view, options, query.dtype) is not None:
                continue
            n_served += 1
            _check_attention(backend, query, view, options, tolerance)
    assert n_served, "the backend supports none of the combinations"
    _check_refusals(backend)


def _check_refusals(backend: AttentionBackend) -> None:
    """What does not fit together is refused, never read past its end."""
    view = make_view(1, 2, 19, 1)
    query = torch.zeros(1, 4, 1, 8)
    for wrong, options in (
        (torch.zeros(1, 4, 2, 8), AttentionOptions(0.3)),
        (torch.zeros(2, 4, 1, 8), AttentionOptions(0.3)),
        (query, AttentionOptions(0.3, mask=torch.zeros(1, 1, 1, 18))),
        (query, AttentionOptions(0.3, mask=torch.zeros(1, 1, 1, 19), mask_offset=1)),
        (query, AttentionOptions(0.3, mask=torch.zeros(1, 3, 1, 19))),
        (query, AttentionOptions(0.3, bias=torch.zeros(1, 1, 1, 18))),
        (query, AttentionOptions(0.3, sinks=torch.zeros(3))),
    ):
        try:
            backend.run(wrong, view, options)
        except ConfigurationError:
            continue
        raise AssertionError(f"queries {tuple(wrong.shape)} with {options} were served")


def _check_pages(codec: Codec, layout: PageLayout) -> None:
    generator = torch.Generator().manual_seed(layout.head_dim)
    n_blocks, n_heads = 3, 2
    n_rows = n_blocks * layout.block_tokens
    values = drawn(n_rows, n_heads, layout.head_dim, generator=generator)
    pages = _encoded(codec, layout, values, [n_rows])
    exact = codec.rounded(values.transpose(0, 1), layout.block_tokens).transpose(0, 1)
    for dtype in _DTYPES:
        out = torch.empty(n_blocks, n_heads, layout.block_tokens, layout.head_dim, dtype=dtype)
        codec.decode(layout, pages, out)
        rows = out.transpose(1, 2).flatten(0, 1)
        assert torch.equal(rows, exact.to(dtype)), f"decode as {dtype} is not what `rounded` promises"
        typed = codec.typed(layout, pages, dtype)
        assert typed is None or torch.equal(typed, out), "the pages as numbers are not what decode gives"
    strided = torch.empty(n_heads, n_blocks, layout.block_tokens, layout.head_dim).transpose(0, 1)
    codec.decode(layout, pages, strided)
    assert torch.equal(strided.transpose(1, 2).flatten(0, 1), exact), "decode into a tensor with strides differs"
    size = codec.group_rows(layout.block_tokens)
    groups = [min(size, layout.block_tokens - at) for at in range(0, layout.block_tokens, size)] * n_blocks
    for chunks in (groups, [n_rows - groups[-1], groups[-1]], [groups[0], n_rows - groups[0]]):
        if 0 not in chunks:
            assert torch.equal(_encoded(codec, layout, values, chunks), pages), (
                f"other bytes when fed in chunks of {chunks}"
            )
    order = torch.randperm(n_rows, generator=generator, device="cpu")
    if size > 1:  # whole pages
        pages_first = torch.randperm(n_blocks, generator=generator, device="cpu")
        order = torch.arange(n_rows, device="cpu").view(n_blocks, -1)[pages_first].flatten()
    block, row = order // layout.block_tokens, order % layout.block_tokens
    shuffled, home = torch.zeros_like(pages), torch.arange(n_rows, device="cpu")
    stored = codec.take(layout, pages, block, row)
    codec.place(layout, shuffled, home // layout.block_tokens, home % layout.block_tokens, stored)
    assert torch.equal(shuffled, _encoded(codec, layout, values[order], [n_rows])), "rows change when they are moved"
    larger = codec.layout(layout.head_dim, 2 * layout.block_tokens)
    moved = torch.zeros(n_blocks, n_heads, larger.nbytes, dtype=torch.uint8)
    codec.move(layout, pages, larger, moved)
    out = torch.empty(n_blocks, n_heads, larger.block_tokens, layout.head_dim)
    codec.decode(larger, moved, out)
    found = out[:, :, : layout.block_tokens].transpose(1, 2).flatten(0, 1)
    assert torch.equal(found, exact), "moving rows to larger pages changes them"
    kept = layout.block_tokens // 2
    scrubbed, other = pages.clone(), _encoded(codec, layout, values.flip(0), [n_rows])
    last = torch.arange(n_rows) % layout.block_tokens < kept
    for which in (scrubbed, other):
        codec.scrub(layout, which, kept)
    out = torch.empty(n_blocks, n_heads, layout.block_tokens, layout.head_dim)
    codec.decode(layout, scrubbed, out)
    assert torch.equal(out.transpose(1, 2).flatten(0, 1)[last], exact[last]), "scrub changes rows that stay"
    if not kept:
        assert torch.equal(scrubbed, other), "scrub leaves bytes of rows that go"


def _encoded(codec: Codec, layout: PageLayout, values: Tensor, chunks: list[int]) -> Tensor:
    pages = torch.zeros(-(-len(values) // layout.block_tokens), values.shape[1], layout.nbytes, dtype=torch.uint8)
    for rows in torch.arange(len(values)).split(chunks):
        codec.encode(layout, pages, rows // layout.block_tokens, rows % layout.block_tokens, values[rows])
    return pages


def _check_plan(plan: KeepPlan, retention: Retention, seen: int, runs: tuple[Run, ...]) -> None:
    flat = positions(plan.runs)
    assert flat == sorted(set(flat)), f"positions do not rise: {plan.runs}"
    stored = set(positions(runs))
    assert set(flat) <= stored, f"{plan.runs} are not all stored"
    assert plan.floor <= seen, f"the floor {plan.floor} is beyond the {seen} tokens seen"
    for length in range(max(plan.floor, 1), seen + 1):
        # A row that went earlier went by an earlier plan, which has a floor of its own.
        missing = [p for p in sorted(stored - set(flat)) if p < length and _sees(retention, length, p)]
        assert not missing, f"cut to {length} tokens, with floor {plan.floor}, the next query lacks {missing}"


def _sees(retention: Retention, query: int, position: int) -> bool:
    return retention.window is None or position > query - retention.window or position < retention.sinks


def _options(n_sequences: int, n_query_heads: int, n_new: int, n_rows: int) -> list[AttentionOptions]:
    generator = torch.Generator().manual_seed(2)
    shape = (n_sequences, n_query_heads, n_new, n_rows)
    see = drawn(*shape, generator=generator) < 0.25
    bias = drawn(*shape, generator=generator)
    scale = 0.3
    return [
        AttentionOptions(scale),
        AttentionOptions(scale, causal=False),
        AttentionOptions(scale, mask=see),
        AttentionOptions(scale, mask=see[:1, :1]),
        AttentionOptions(scale, mask=torch.zeros(shape).masked_fill(~see, torch.finfo(torch.float32).min)),
        AttentionOptions(scale, mask=torch.zeros_like(see)),
        AttentionOptions(scale, bias=bias),
        AttentionOptions(scale, softcap=1.5),
        AttentionOptions(scale, sinks=bias[0, :, 0, 0]),
        AttentionOptions(scale, mask=see, bias=bias, softcap=2.0, sinks=bias[0, :, 0, 0]),
    ]


def _check_attention(
    backend: AttentionBackend, query: Tensor, view: KVView, options: AttentionOptions, tolerance: float
) -> None:
    out, lse = backend.run(query, view, options)
    expected, expected_lse = ReferenceBackend().run(query.double(), view, options)
    assert out.dtype == query.dtype
    assert out.shape == expected.shape
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=tolerance, atol=tolerance)
    if options.sinks is None:
        joined, joined_lse = merge_states([out, torch.zeros_like(out)], [lse, torch.full_like(lse, -torch.inf)])
        torch.testing.assert_close(joined, out, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(joined_lse, lse, rtol=tolerance, atol=tolerance)
