"""Fault 19: rows that nobody wrote, or that were freed, are never read. The whole pool is filled with NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stratakv.blocks.arena import Arena
from stratakv.policies import Window
from stratakv.spec import Member
from stratakv.testing.running import assert_logits_equal, cache_argument, fed_logits, random_ids, uncached_logits
from stratakv.testing.tiny import PAD_ID, tiny_gemma3, tiny_llama, tiny_mistral
from stratakv.testing.ways import LAYOUTS, WAYS, model_for, small_cache

pytestmark = pytest.mark.usefixtures("new_memory_is_nan")


@pytest.fixture
def new_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand out NaN where the arena would hand out zeros, so that an unwritten row shows as well as a freed one."""

    def all_ones(arena: Arena, n_blocks: int, member: Member) -> Tensor:
        return torch.full((n_blocks, member.nbytes), 0xFF, dtype=torch.uint8, device=arena.device)

    monkeypatch.setattr(Arena, "_zeros", all_ones)


def assert_free_blocks_are_nan(cache: Any) -> None:
    memory = cache.batch.memory
    n_checked = 0
    for pool, arena in zip(memory.ledger.pools, memory.arenas, strict=True):
        for block in range(pool.n_total):
            if pool.references(block) == 0:
                slab, index = arena.locate(block)
                assert all(bool((t[index] == 0xFF).all()) for t in arena.slabs[slab].members)
                n_checked += 1
    assert n_checked, "no block is free, so the test shows nothing"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral, tiny_gemma3])
@pytest.mark.parametrize("n_format", ["fp32", "bf16", "fp16"])
def test_lengths_5_and_1_with_padding_in_a_pool_of_nan(make: Any, layout: str, way: str, n_format: str) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    ids = random_ids(3, 9, seed=30)
    n_pads = (0, 4, 2)
    mask = torch.ones_like(ids)
    for row, n in enumerate(n_pads):
        ids[row, :n], mask[row, :n] = PAD_ID, 0
    cache = small_cache(model, layout, format=n_format)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    pieces = []
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        with torch.no_grad():
            output = model(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                **cache_argument(model, cache),
                use_cache=True,
            )
        cache.check()
        pieces.append(output.logits)
    found = torch.cat(pieces, 1)
    assert torch.isfinite(found).all()
    tolerance = {"fp32": 3e-5, "fp16": 2e-2, "bf16": 1e-1}[n_format]
    for row, n in enumerate(n_pads):
        assert_logits_equal(found[row : row + 1, n:], uncached_logits(plain, ids[row : row + 1, n:]), tolerance)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral])
def test_freed_blocks_hold_nan_and_are_used_again(make: Any, way: str) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    cache = small_cache(model)
    keeper = cache.fork()
    fed_logits(model, cache, random_ids(2, 30, seed=31))
    fed_logits(model, keeper, random_ids(2, 3, seed=32))  # holds blocks behind those that go now
    for n_tokens in (30, 7, 22, 1):
        cache.reset()
        keeper.check()
        assert_free_blocks_are_nan(keeper)
        ids = random_ids(2, n_tokens, seed=n_tokens)
        assert_logits_equal(fed_logits(model, cache, ids), uncached_logits(plain, ids))
    more = random_ids(2, 2, seed=33)
    expected = uncached_logits(plain, torch.cat([random_ids(2, 3, seed=32), more], 1))[:, 3:]
    assert_logits_equal(fed_logits(model, keeper, more), expected)


def test_blocks_that_leave_a_policys_window_hold_nan() -> None:
    model = model_for("attached", tiny_llama)
    cache = small_cache(model, policy=Window((4, 6), sinks=2))
    assert torch.isfinite(fed_logits(model, cache, random_ids(2, 40, seed=34), [30] + [1] * 10)).all()
    assert_free_blocks_are_nan(cache)


@pytest.mark.parametrize("drop", ["fork", "checkpoint"])
def test_blocks_of_what_was_garbage_collected_hold_nan(drop: str) -> None:
    model = model_for("gathered", tiny_llama)
    cache = small_cache(model)
    fed_logits(model, cache, random_ids(1, 20, seed=35))
    other = cache.fork() if drop == "fork" else cache.checkpoint()
    cache.truncate(4)
    fed_logits(model, cache, random_ids(1, 6, seed=36))
    free_before = cache.check().blocks.free
    del other
    assert cache.check().blocks.free > free_before
    assert_free_blocks_are_nan(cache)
