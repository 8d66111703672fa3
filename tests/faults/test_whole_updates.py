"""Fault 44: an update is whole or did not happen, and what is refused takes nothing away."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stratakv as sk
from stratakv.blocks.arena import Arena
from stratakv.blocks.batch import SequenceBatch
from stratakv.blocks.geometry import build_spec
from stratakv.blocks.memory import Memory
from stratakv.errors import CapacityError, StateError
from stratakv.plan import KeepPlan
from stratakv.policies import Window
from stratakv.spec import LayerSpec
from stratakv.testing.running import (
    assert_logits_equal,
    cache_argument,
    fed_logits,
    random_ids,
    uncached_logits,
)
from stratakv.testing.tiny import tiny_gemma2, tiny_gemma3, tiny_llama, tiny_mistral
from stratakv.testing.ways import LAYOUTS, WAYS, model_for, small_cache

every_way = pytest.mark.parametrize("way", WAYS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def overflowing(model: Any, limit: str) -> Any:
    """A cache in which 16 tokens of 2 sequences fit, and 24 do not."""
    if limit == "capacity":
        return small_cache(model, "contiguous", capacity=16)
    layout = "growing" if limit == "growing budget" else "paged"
    probe = small_cache(model, layout)
    fed_logits(model, probe, random_ids(2, 16))
    return small_cache(model, layout, memory=probe.nbytes if layout == "paged" else 2 * probe.nbytes)


@every_way
@pytest.mark.parametrize("limit", ["capacity", "budget"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
def test_a_forward_that_does_not_fit_changes_nothing(make: Any, way: str, limit: str) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    ids = random_ids(2, 40, seed=60)
    cache = overflowing(model, limit)
    fed_logits(model, cache, ids[:, :13], [10, 3])
    blocks = cache.check().blocks
    before = (cache.seen_tokens, cache.stored_tokens, cache.nbytes, cache.get_seq_length())
    rows = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    for _ in range(3):
        with pytest.raises(CapacityError, match="nothing was changed"):
            fed_logits(model, cache, ids[:, 13:])
        assert (cache.seen_tokens, cache.stored_tokens, cache.nbytes, cache.get_seq_length()) == before
        assert cache.check().blocks == blocks
    for layer, (keys, values) in zip(cache.layers, rows, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    expected = uncached_logits(plain, ids[:, :16])[:, 13:]
    assert_logits_equal(fed_logits(model, cache, ids[:, 13:16], [1, 2]), expected)


@every_way
@pytest.mark.parametrize("limit", ["capacity", "budget"])
def test_generate_that_runs_full_leaves_a_cache_that_goes_on(way: str, limit: str) -> None:
    model, plain = model_for(way, tiny_llama), model_for("gathered", tiny_llama)
    ids = random_ids(2, 10, seed=61)
    cache = overflowing(model, limit)
    mask = torch.ones_like(ids)
    with pytest.raises(CapacityError):
        model.generate(ids, attention_mask=mask, **cache_argument(model, cache), max_new_tokens=30)
    cache.check()
    assert cache.seen_tokens == 16
    cache.truncate(10)
    more = random_ids(2, 5, seed=62)
    expected = uncached_logits(plain, torch.cat([ids, more], 1))[:, 10:]
    assert_logits_equal(fed_logits(model, cache, more), expected)


@pytest.mark.parametrize("limit", ["capacity", "budget", "growing budget"])
def test_a_first_forward_that_does_not_fit_leaves_an_empty_cache(limit: str) -> None:
    model = model_for("gathered", tiny_llama)
    cache = overflowing(model, limit)
    with pytest.raises(CapacityError):
        fed_logits(model, cache, random_ids(2, 400, seed=63))
    assert (cache.seen_tokens, cache.batch_size, cache.nbytes) == (0, -1, 0)
    ids = random_ids(1, 16, seed=64)  # another batch size, since none was taken on
    assert_logits_equal(fed_logits(model, cache, ids), uncached_logits(model, ids))


def test_a_growing_cache_that_may_not_double_goes_on_as_it_was() -> None:
    model = model_for("gathered", tiny_llama)
    cache = overflowing(model, "growing budget")
    ids = random_ids(2, 400, seed=65)
    fed_logits(model, cache, ids[:, :50])
    before = (cache.nbytes, cache.spec)
    with pytest.raises(CapacityError):
        fed_logits(model, cache, ids[:, 50:])
    assert (cache.nbytes, cache.spec, cache.seen_tokens) == (*before, 50)
    assert_logits_equal(fed_logits(model, cache, ids[:, 50:60]), uncached_logits(model, ids[:, :60])[:, 50:])


def test_a_refused_forward_takes_no_way_back_away() -> None:
    model = model_for("attached", tiny_llama)
    ids = random_ids(1, 60, seed=66)
    probe = small_cache(model, policy=Window(8))
    fed_logits(model, probe, ids[:, :24])
    cache = small_cache(model, policy=Window(8), memory=probe.nbytes)
    fed_logits(model, cache, ids[:, :20])
    with pytest.raises(CapacityError):
        fed_logits(model, cache, ids[:, 20:])
    cache.truncate(12)  # exact before the refused forward, so exact after it
    assert cache.seen_tokens == 12


def test_a_growing_cache_that_is_refused_more_evicts_nothing() -> None:
    model = model_for("gathered", lambda: tiny_gemma2(window=3))
    ids = random_ids(1, 70, seed=69)
    cache = sk.KVCache.for_model(model, layout="growing", block_tokens=2)
    fed_logits(model, cache, ids[:, :60])
    forks = [cache.fork() for _ in range(3)]
    for fork in forks:  # which keep what leaves the window, and have a block of their own in each group
        fork.activate_past_recording()
        fed_logits(model, fork, ids[:, 60:61])
    memory = cache.batch.memory
    sizes = {group.retention.window: group.bytes_per_block for group in memory.spec.groups}
    memory.max_bytes = memory.nbytes + 2 * sizes[None] + 3 * sizes[3]  # less than all forks' blocks doubled
    with pytest.raises(CapacityError, match="nothing was changed"):
        fed_logits(model, cache, ids[:, 60:65])
    cache.truncate(40)  # exact before the refused forward
    cache.check()


def test_a_step_that_the_system_has_no_memory_for_evicts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_for("gathered", lambda: tiny_mistral(window=3))
    ids = random_ids(1, 60, seed=70)
    cache = sk.KVCache.for_model(model, block_tokens=8)
    fed_logits(model, cache, ids[:, :16])
    before = [(table.runs, table.floor) for s in cache.batch.sequences for table in s.tables]

    def refuse(*args: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Arena, "_new_members", refuse)
        with pytest.raises(CapacityError, match="nothing was changed"):
            fed_logits(model, cache, ids[:, 16:])
    assert [(table.runs, table.floor) for s in cache.batch.sequences for table in s.tables] == before
    cache.check()
    assert_logits_equal(fed_logits(model, cache, ids[:, 16:]), uncached_logits(model, ids)[:, 16:])


@pytest.mark.parametrize("evicts_first", [False, True])
def test_beams_that_fit_once_their_windows_moved_are_not_refused(evicts_first: bool) -> None:
    policy = Window(3)
    spec = build_spec([LayerSpec(0, 1, 4, 4)], k_format="fp32", v_format="fp32", block_tokens=4, policy=policy)
    batch = SequenceBatch(Memory(spec, device=torch.get_default_device()), policy)
    rows = torch.randn(3, 1, 9, 4)
    batch.begin(1, 9)
    batch.write(0, rows[:1], rows[:1])
    batch.select([0, 0, 0])  # of three holders of the last block one keeps it
    batch.memory.max_bytes = batch.memory.nbytes + batch.memory.spec.groups[0].bytes_per_block
    if evicts_first:
        batch.evict()
    batch.begin(3, 1)
    batch.write(0, rows[:, :, :1], rows[:, :, :1])
    batch.memory.check()


def test_a_refused_forward_leaves_what_the_cache_knows_of_its_tokens() -> None:
    model = model_for("gathered", tiny_llama)
    cache = overflowing(model, "budget")
    ids = random_ids(1, 40, seed=67)
    fed_logits(model, cache, ids[:, :10])
    cache.token_ids = (tuple(ids[0, :10].tolist()),)
    with pytest.raises(CapacityError):
        fed_logits(model, cache, ids)
    assert cache.match_prefix(ids[:, :8]) == 7


def test_a_compaction_that_does_not_fit_changes_nothing() -> None:
    model, plain = model_for("attached", tiny_llama), model_for("gathered", tiny_llama)
    ids = random_ids(1, 14, seed=68)
    probe = small_cache(model)
    fed_logits(model, probe, ids[:, :12])
    cache = small_cache(model, memory=probe.nbytes * 4 // 3)  # three blocks, and room for one more
    fed_logits(model, cache, ids[:, :12])
    cache.batch_repeat_interleave(2)  # both share their blocks, so packing one frees nothing for the other
    with pytest.raises(CapacityError):
        cache.compact(KeepPlan(((0, 4), (5, 3), (9, 1)), floor=12))
    cache.check()
    assert {sequence.stored_tokens for sequence in cache.batch.sequences} == {12}
    cache.batch_select_indices(torch.tensor([0]))
    expected = uncached_logits(plain, ids)[:, 12:]
    assert_logits_equal(fed_logits(model, cache, ids[:, 12:]), expected)


def test_a_view_from_before_blocks_moved_is_refused() -> None:
    layers = [LayerSpec(0, 1, 4, 4)]
    spec = build_spec(layers, k_format="fp32", v_format="fp32", layout="paged", block_tokens=2)
    memory = Memory(spec, device=torch.get_default_device())
    first, second = SequenceBatch(memory), SequenceBatch(memory)
    rows = torch.randn(1, 1, 160, 4)
    for batch in (first, second):
        batch.begin(1, 160)
        view = batch.write(0, rows, -rows)
    first.reset()
    memory.settle()  # moves the rows of `second` to the front, to give the slabs behind them back
    with pytest.raises(StateError, match="moved"):
        view.gather(torch.float32)
    keys, values = second.view(0).gather(torch.float32)
    assert torch.equal(keys, rows)
    assert torch.equal(values, -rows)


def test_a_step_that_failed_after_its_evictions_leaves_no_view_of_what_left(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [LayerSpec(0, 1, 1, 1, 2), LayerSpec(1, 1, 1, 1)]
    spec = build_spec(layers, k_format="fp32", v_format="fp32", block_tokens=2)
    batch = SequenceBatch(Memory(spec, device=torch.get_default_device(), poison=True))
    rows = torch.arange(1.0, 8.0).view(1, 1, 7, 1)
    batch.begin(1, 7)
    for layer in (0, 1):
        batch.write(layer, rows, -rows)
    twin = batch.fork()
    twin.evict()  # so that it holds the last blocks, and not those that left the window

    def fail(*args: Any) -> None:
        raise RuntimeError("a device that is gone")

    monkeypatch.setattr(Arena, "copy", fail)
    with pytest.raises(RuntimeError):
        batch.begin(1, 1)
    keys, _ = batch.view(0).gather(torch.float32)
    assert keys.flatten().tolist() == [7.0]


@every_way
@pytest.mark.parametrize("block_tokens", [1, 4, 6, 64])
def test_capacity_does_not_count_what_leaves(way: str, block_tokens: int) -> None:
    model, plain = model_for(way, tiny_mistral), model_for("gathered", tiny_mistral)
    ids = random_ids(1, 20, seed=72)
    cache = sk.KVCache.for_model(model, layout="contiguous", capacity=8, block_tokens=block_tokens)
    found = fed_logits(model, cache, ids, [8, *[1] * 12])  # a prompt that fills it, and then a window that moves
    assert_logits_equal(found, uncached_logits(plain, ids))


def test_a_layer_of_another_shape_that_there_is_no_memory_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [LayerSpec(0, 1, 2, 2), LayerSpec(1, 1, 2, 2)]
    spec = build_spec(layers, k_format="fp32", v_format="fp32", block_tokens=4)
    batch = SequenceBatch(Memory(spec, device=torch.get_default_device()))
    batch.begin(1, 3)

    def refuse(*args: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Arena, "_zeros", refuse)
        with pytest.raises(CapacityError, match="nothing was changed"):
            batch.respec_layer(LayerSpec(0, 1, 6, 6))
    assert batch.memory.spec == spec
    batch.memory.check()
    batch.respec_layer(LayerSpec(0, 1, 6, 6))
    rows = torch.randn(1, 1, 3, 6)
    keys, values = batch.write(0, rows, -rows).gather(torch.float32)
    assert torch.equal(keys, rows)
    assert torch.equal(values, -rows)
