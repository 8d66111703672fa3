"""Faults 41 to 43: growth, forks, and bytes that are really given back."""

from __future__ import annotations

import copy
import mmap
from typing import Any

import pytest
import torch

from stratakv.blocks.batch import SequenceBatch
from stratakv.blocks.geometry import build_spec
from stratakv.blocks.memory import Memory
from stratakv.errors import CapacityError
from stratakv.plan import KeepPlan
from stratakv.policies import Window
from stratakv.spec import LayerSpec
from stratakv.testing.running import (
    assert_logits_equal,
    fed_logits,
    random_ids,
    uncached_logits,
)
from stratakv.testing.tiny import tiny_gemma3, tiny_llama
from stratakv.testing.ways import LAYOUTS, WAYS, model_for, small_cache

every_way = pytest.mark.parametrize("way", WAYS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)

# 41. Growth


def grown(layout: str, n_tokens: int, chunk: int) -> tuple[Memory, list[int]]:
    """Memory after two sequences grew to `n_tokens`, and the bytes held after each step."""
    layers = [LayerSpec(i, 2, 8, 8) for i in range(2)]
    capacity = n_tokens if layout == "contiguous" else None
    spec = build_spec(layers, k_format="fp32", v_format="fp32", layout=layout, block_tokens=16, capacity=capacity)
    memory = Memory(spec, device=torch.get_default_device())
    batch = SequenceBatch(memory)
    held = []
    rows = torch.arange(n_tokens, dtype=torch.float32)[None, None, :, None].expand(2, 2, n_tokens, 8)
    for start in range(0, n_tokens, chunk):
        batch.begin(2, chunk)
        for layer in range(2):
            batch.write(layer, rows[:, :, start : start + chunk], -rows[:, :, start : start + chunk])
        held.append(memory.nbytes)
    keys, values = batch.view(1).gather(torch.float32)
    assert torch.equal(keys, rows)
    assert torch.equal(values, -rows)
    memory.check()
    return memory, held


@pytest.mark.parametrize("chunk", [1, 64, 4096])
def test_growing_copies_each_byte_a_bounded_number_of_times(chunk: int) -> None:
    memory, held = grown("growing", 4096, chunk)
    needed = memory.spec.bytes_per_token() * 4096 * 2
    assert memory.check().bytes_copied_by_growth <= needed
    assert held[-1] < 2 * needed + 4096
    assert len(set(held)) <= 8  # doublings, not a growth with each token


def test_growing_does_copy_so_the_count_is_a_count() -> None:
    memory, _ = grown("growing", 4096, 64)
    assert memory.check().bytes_copied_by_growth >= memory.spec.bytes_per_token() * 2048


@pytest.mark.parametrize("layout", ["paged", "contiguous"])
@pytest.mark.parametrize("chunk", [1, 64])
def test_pages_and_preallocated_rows_are_never_copied(layout: str, chunk: int) -> None:
    memory, held = grown(layout, 4096, chunk)
    needed = memory.spec.bytes_per_token() * 4096 * 2
    assert memory.check().bytes_copied_by_growth == 0
    assert held == sorted(held)
    assert held[-1] <= 1.25 * needed


def test_paged_memory_follows_what_is_stored_closely() -> None:
    memory, held = grown("paged", 4096, 64)
    for step, n_bytes in enumerate(held, start=1):
        assert n_bytes <= 1.25 * step * 64 * 2 * memory.spec.bytes_per_token()


@pytest.mark.parametrize(("layout", "capacity"), [("paged", None), ("growing", None), ("contiguous", 1 << 20)])
@pytest.mark.parametrize("error", [OSError(12, "Cannot allocate memory"), OverflowError()])
def test_memory_that_the_system_refuses_changes_nothing(
    layout: str, capacity: int | None, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = build_spec([LayerSpec(0, 8, 64, 64)], k_format="fp32", v_format="fp32", layout=layout, capacity=capacity)
    memory = Memory(spec, device=torch.device("cpu"))
    batch = SequenceBatch(memory)
    rows = torch.ones(1, 8, 7, 64, device="cpu")
    if capacity is None:
        batch.begin(1, 7)
        batch.write(0, rows, rows)
    held, used, real = memory.nbytes, 0, mmap.mmap

    def some_then_none(*args: Any, **options: Any) -> mmap.mmap:
        nonlocal used
        used += 1
        if used > 1 or layout != "paged":
            raise error
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", some_then_none)
        with pytest.raises(CapacityError, match="nothing was changed"):
            batch.begin(1, 1 << 20)
    memory.check()
    assert memory.nbytes == held
    batch.begin(1, 7)
    batch.write(0, rows, rows)
    memory.check()


def test_memory_that_the_device_does_not_have_is_a_capacity_error() -> None:
    spec = build_spec(
        [LayerSpec(0, 8, 64, 64)], k_format="fp32", v_format="fp32", layout="contiguous", capacity=1 << 40
    )
    batch = SequenceBatch(Memory(spec, device=torch.get_default_device()))
    with pytest.raises(CapacityError, match="nothing was changed"):
        batch.begin(1, 7)
    batch.memory.check()
    assert batch.memory.nbytes == 0


# 42. One context, several continuations


@every_way
@every_layout
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
@pytest.mark.parametrize("how", ["fork", "deepcopy"])
def test_a_stored_prefix_is_not_changed_by_what_was_forked_from_it(make: Any, layout: str, way: str, how: str) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    prefix = random_ids(1, 10, seed=40)
    stored = small_cache(model, layout)
    fed_logits(model, stored, prefix)
    twins = [stored.fork() if how == "fork" else copy.deepcopy(stored) for _ in range(2)]
    kept = [(layer.keys.clone(), layer.values.clone()) for layer in stored.layers]
    twins.append(twins[1].fork())
    questions = [random_ids(1, 5, seed=41 + i) for i in range(3)]
    pieces: list[list[Any]] = [[], [], []]
    for t in range(5):  # in turns, so that one writes while the others are in the middle
        for twin, question, piece in zip(twins, questions, pieces, strict=True):
            piece.append(fed_logits(model, twin, question[:, t : t + 1]))
            stored.check()
    for question, piece in zip(questions, pieces, strict=True):
        expected = uncached_logits(plain, torch.cat([prefix, question], 1))[:, 10:]
        assert_logits_equal(torch.cat(piece, 1), expected)
    assert stored.seen_tokens == stored.get_seq_length() == 10
    for layer, (keys, values) in zip(stored.layers, kept, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    expected = uncached_logits(plain, torch.cat([prefix, questions[0]], 1))[:, 10:]
    assert_logits_equal(fed_logits(model, stored, questions[0]), expected)


@every_way
@every_layout
def test_a_checkpoint_is_come_back_to_as_often_as_wanted(layout: str, way: str) -> None:
    model, plain = model_for(way, tiny_gemma3), model_for("gathered", tiny_gemma3)
    prefix = random_ids(2, 10, seed=45)
    cache = small_cache(model, layout)
    fed_logits(model, cache, prefix)
    mark = cache.checkpoint()
    for n in range(3):
        question = random_ids(2, 6, seed=46 + n)
        expected = uncached_logits(plain, torch.cat([prefix, question], 1))[:, 10:]
        assert_logits_equal(fed_logits(model, cache, question, [4, 1, 1]), expected)
        cache.rollback(mark)
        cache.check()
        assert cache.seen_tokens == mark.seen_tokens == 10
    cached = cache.check().blocks
    mark.release()
    assert cache.check().blocks.cached == 0
    assert cached.held == cache.check().blocks.held  # what the checkpoint shared with the cache stays


def test_a_fork_costs_one_block_a_sequence_when_written() -> None:
    model = model_for("gathered", tiny_llama)
    cache = small_cache(model)
    fed_logits(model, cache, random_ids(1, 41, seed=50))
    before = cache.check().blocks
    twin = cache.fork()
    assert cache.check().blocks.held == before.held
    fed_logits(model, twin, random_ids(1, 1, seed=51))
    assert cache.check().blocks.held == before.held + 1


# 43. Dropping rows gives bytes back


@pytest.mark.parametrize("policy", [Window(8), Window((4, 16)), Window(8, sinks=4)])
def test_streaming_under_a_window_holds_few_bytes(policy: Window) -> None:
    model = model_for("attached", tiny_llama)
    whole, limited = small_cache(model), small_cache(model, policy=policy)
    for cache in (whole, limited):
        fed_logits(model, cache, random_ids(1, 256, seed=52), [16] + [4] * 60)
    assert limited.nbytes < whole.nbytes / 4
    assert limited.check().used_bytes < whole.check().used_bytes / 4


@pytest.mark.parametrize("policy", [Window(8), Window((4, 16)), Window(8, sinks=4)])
def test_bytes_go_down_after_a_long_prompt_left_the_window(policy: Window) -> None:
    model = model_for("attached", tiny_llama)
    cache = small_cache(model, policy=policy)
    fed_logits(model, cache, random_ids(1, 256, seed=53))
    after_prompt = cache.nbytes
    fed_logits(model, cache, random_ids(1, 16, seed=54), [1] * 16)
    assert cache.check().used_bytes < after_prompt / 4
    assert cache.nbytes < after_prompt / 2


@pytest.mark.parametrize(
    "options", [{"policy": Window(8)}, *({"format": name, "block_tokens": 64} for name in ("int8", "int4", "int2"))]
)
def test_bytes_go_down_with_the_second_token_after_a_long_prompt(options: dict[str, Any]) -> None:
    """Rows that left with the first one, of a window or of those held in 16 bits as well, hold no memory then."""
    model = model_for("attached", tiny_llama)
    at_once, in_parts = small_cache(model, **options), small_cache(model, **options)
    prompt, more = random_ids(1, 1024, seed=57), random_ids(1, 2, seed=58)
    for cache, chunks in ((at_once, [1024]), (in_parts, [64] * 16)):
        fed_logits(model, cache, prompt, chunks)
        fed_logits(model, cache, more, [1, 1])
    assert at_once.nbytes <= 1.1 * in_parts.nbytes


@pytest.mark.parametrize("runs", [((0, 8),), ((0, 4), (96, 4)), ((3, 2), (50, 1), (97, 3))])
def test_bytes_go_down_with_a_compaction(runs: tuple[tuple[int, int], ...]) -> None:
    model = model_for("attached", tiny_llama)
    cache = small_cache(model)
    fed_logits(model, cache, random_ids(2, 100, seed=55), [10] * 10)
    before = cache.nbytes
    cache.compact(KeepPlan(runs, floor=100))
    assert cache.check().used_bytes <= before / 5
    assert cache.nbytes < before / 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_go_down_with_a_truncation_and_a_reset(layout: str) -> None:
    model = model_for("gathered", tiny_llama)
    cache = small_cache(model, layout, **({"capacity": 100} if layout == "contiguous" else {}))
    fed_logits(model, cache, random_ids(1, 100, seed=56), [10] * 10)
    before = cache.nbytes
    cache.truncate(10)
    if layout == "paged":
        assert cache.nbytes < before / 2
    cache.reset()
    assert cache.nbytes == 0
