"""Formats whose keys are coded in groups of rows: bounds, outliers, chunking, and recent rows in 16 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stratakv import KVCache
from stratakv.blocks.arena import Arena
from stratakv.blocks.batch import SequenceBatch
from stratakv.blocks.geometry import build_spec, rows_coded_together
from stratakv.blocks.memory import Memory
from stratakv.codecs import Codec, get_codecs
from stratakv.codecs.rotation import rotated
from stratakv.errors import ConfigurationError, StateError, UnsupportedError
from stratakv.plan import KeepPlan, WritePlan
from stratakv.policies import Window
from stratakv.spec import LayerSpec
from stratakv.testing.running import assert_logits_equal, fed_logits, random_ids, uncached_logits
from stratakv.testing.tiny import tiny_gemma3, tiny_llama, tiny_t5
from stratakv.testing.views import drawn
from stratakv.testing.ways import LAYOUTS, WAYS, model_for, small_cache
from stratakv.verification import verify

FORMATS = ("int4", "int2")
every_format = pytest.mark.parametrize("name", FORMATS)
every_way = pytest.mark.parametrize("way", WAYS)


def keys_of(name: str) -> Codec:
    return get_codecs(name, name)[0]


def values_of(name: str) -> Codec:
    return get_codecs(name, name)[1]


# Keys


@every_format
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(
    numbers=st.lists(
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3),
        min_size=1,
        max_size=9,
    )
)
def test_any_finite_keys_stay_finite_and_within_a_step(name: str, numbers: list[list[float]]) -> None:
    rows = torch.tensor(numbers)  # [n_rows, 3]
    found = keys_of(name).rounded(rows)
    assert torch.isfinite(found).all()
    low, high = (bound.double() for bound in rows.aminmax(dim=0))
    step = (high - low) / (2 ** keys_of(name).bits - 1)  # type: ignore[attr-defined]  # of these codecs
    largest = rows.abs().amax(0).double()
    # Half a step, and what bf16 rounds off the lowest level and the step; below 1e-38 it has fewer bits.
    bound = step / 2 + largest * 2**-7 + 3e-38
    is_held = largest < 1e38
    assert bool(((found.double() - rows.double()).abs() <= bound)[:, is_held].all())


@every_format
@pytest.mark.parametrize("outlier", [100.0, -60_000.0, 1e30])
def test_a_large_channel_of_keys_costs_the_others_nothing(name: str, outlier: float) -> None:
    rows = drawn(64, 64, generator=torch.Generator().manual_seed(1))
    larger = rows.clone()
    larger[:, 17] *= outlier
    others = torch.arange(64) != 17
    assert torch.equal(keys_of(name).rounded(larger)[:, others], keys_of(name).rounded(rows)[:, others])


@every_format
@pytest.mark.parametrize("number", [0.0, 3.0, -1e36, 1e-30, 65520.0])
def test_constant_channels_come_back(name: str, number: float) -> None:
    rows = torch.full((64, 8), number)
    for codec in (keys_of(name), values_of(name)):
        # A rotated constant row is one large number: what bf16 rounds off a step counts up to 15 times.
        torch.testing.assert_close(codec.rounded(rows), rows, rtol=4e-2, atol=0)


@every_format
def test_a_key_that_is_no_number_shows_in_its_channel_alone(name: str) -> None:
    rows = drawn(64, 8, generator=torch.Generator().manual_seed(2))
    expected = keys_of(name).rounded(rows)
    rows[5, 3] = torch.inf
    found = keys_of(name).rounded(rows)
    assert bool(found[:, 3].isnan().all())
    others = torch.arange(8) != 3
    assert torch.equal(found[:, others], expected[:, others])


# Values


@every_format
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(numbers=st.lists(st.floats(-(2.0**122), 2.0**122, width=32), min_size=1, max_size=40))
def test_any_finite_values_stay_finite_and_within_a_step(name: str, numbers: list[float]) -> None:
    row = torch.tensor(numbers)
    found = values_of(name).rounded(row)
    assert torch.isfinite(found).all()
    size = max(float(row.abs().max()), 1e-37)
    turned = rotated((row.double() / size).float()).double()
    span = float(turned.max() - turned.min())
    # Half a step, and what bf16 rounds off; other levels are chosen where they are better.
    step = span / (2 ** values_of(name).bits - 1) / 2  # type: ignore[attr-defined]  # of these codecs
    bound = (step + float(turned.abs().max()) * 2**-6) * size * len(row) ** 0.5 + 1e-36
    assert float((row.double() - found.double()).norm()) <= bound


@every_format
def test_scales_follow_the_data(name: str) -> None:
    rows = drawn(200, 64, generator=torch.Generator().manual_seed(3)) * torch.logspace(-30, 30, 200)[:, None]
    rows, found = rows.double(), values_of(name).rounded(rows).double()
    error = (found - rows).norm(dim=-1) / rows.norm(dim=-1)
    assert float(error.max()) <= {"int4": 0.14, "int2": 0.5}[name]


# Rows in a cache

LAYER = LayerSpec(0, 2, 24, 16)


def filled(
    name: str, n_rows: int, chunks: list[int], *, block_tokens: int = 64, rows: tuple[Tensor, Tensor] | None = None
) -> SequenceBatch:
    """A batch of two sequences over one layer, with the same rows whatever the chunks are."""
    generator = torch.Generator().manual_seed(4)
    keys, values = rows or (
        drawn(2, 2, n_rows, 24, generator=generator),
        drawn(2, 2, n_rows, 16, generator=generator),
    )
    spec = build_spec([LAYER], k_format=name, v_format=name, block_tokens=block_tokens)
    batch = SequenceBatch(Memory(spec, device=keys.device, poison=True))
    at = 0
    for n in chunks:
        batch.begin(2, n)
        batch.write(0, keys[:, :, at : at + n], values[:, :, at : at + n])
        at += n
    assert at == n_rows
    return batch


def packed(batch: SequenceBatch) -> list[Tensor]:
    """The bytes of each sequence's blocks of few bits, but for those of rows whose group is not complete."""
    found = []
    for sequence in batch.sequences:
        table, arena = sequence.tables[0], batch.memory.arenas[0]
        size = rows_coded_together(arena.spec)
        n = table.n_rows // size * size
        blocks = table.block_ids[: -(-n // arena.spec.block_tokens)]
        found += [each.clone() for each in arena.dump(blocks, n)]
    return found


@every_format
@pytest.mark.parametrize("block_tokens", [4, 64, 100])
@pytest.mark.parametrize("chunks", [[1] * 230, [7] * 32 + [6], [64, 64, 64, 38], [63, 2, 165], [100, 130]])
def test_the_same_rows_give_the_same_codes_however_they_come(name: str, chunks: list[int], block_tokens: int) -> None:
    whole = packed(filled(name, 230, [230], block_tokens=block_tokens))
    for one, other in zip(packed(filled(name, 230, chunks, block_tokens=block_tokens)), whole, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("prompt", [192, 240])
def test_rows_are_coded_once(prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers#34096: a cache that took all it held apart at every flush became slower with length.
    coded, right = [], Arena.write

    def counting(
        self: Arena, member: int, plan: WritePlan, keys: Tensor, values: Tensor, *, in_groups: bool = False
    ) -> None:
        if in_groups:
            coded.append(len(plan.tables) * plan.n_tokens)
        right(self, member, plan, keys, values, in_groups=in_groups)

    monkeypatch.setattr(Arena, "write", counting)
    batch = filled("int4", prompt + 64, [prompt, *[1] * 64])
    assert sum(coded) == 2 * ((prompt + 64) // 64 * 64)
    assert len(coded) == 2  # with the prompt, and in one of the steps
    del batch


def test_whole_groups_are_flushed_and_bytes_are_real() -> None:
    # VeloxQuant-MLX#162, KIVI#40: groups of 4, a prompt of 4, then 21 single tokens.
    batch = filled("int2", 25, [4, *[1] * 21], block_tokens=4)
    whole = filled("int2", 25, [25], block_tokens=4)
    for one, other in zip(packed(batch), packed(whole), strict=True):
        assert torch.equal(one, other)
    held = sum(slab.numel() for arena in batch.memory.arenas for group in arena.slabs for slab in group.members)
    assert batch.memory.nbytes == held == batch.memory.check().held_bytes


@every_format
def test_recent_rows_and_the_first_ones_are_read_in_16_bits(name: str) -> None:
    # transformers#35185: a prompt within the residual is exact; one large channel leaves the others near.
    short = filled(name, 50, [50])
    generator = torch.Generator().manual_seed(4)
    keys, values = drawn(2, 2, 50, 24, generator=generator), drawn(2, 2, 50, 16, generator=generator)
    read = short.view(0).gather(torch.float32)
    assert torch.equal(read[0], keys.bfloat16().float())
    assert torch.equal(read[1], values.bfloat16().float())
    keys, values = drawn(2, 2, 200, 24, generator=generator), drawn(2, 2, 200, 16, generator=generator)
    keys[..., 5] *= 100
    long = filled(name, 200, [199, 1], rows=(keys, values))
    found, _ = long.view(0).gather(torch.float32)
    exact = keys.bfloat16().float()
    assert torch.equal(found[:, :, :16], exact[:, :, :16])
    assert torch.equal(found[:, :, 144:], exact[:, :, 144:])
    assert not torch.equal(found[:, :, 16:144], exact[:, :, 16:144])
    others = torch.arange(24) != 5
    assert float((found - keys)[..., others].abs().max()) <= {"int4": 0.3, "int2": 1.4}[name]


def test_a_later_key_of_a_hundred_times_the_range_is_read_as_what_it_is() -> None:
    # transformers' fp8 layer froze its scale at the first update, and later keys saturated in silence.
    generator = torch.Generator().manual_seed(5)
    keys, values = drawn(2, 2, 256, 24, generator=generator), drawn(2, 2, 256, 16, generator=generator)
    keys[:, :, 100:] *= 100
    values[:, :, 100:] *= 100
    for name, allowed in (("int8", 0.02), ("fp8", 0.04), ("int4", 0.1), ("int2", 0.5)):
        found = filled(name, 256, [64, 64, 64, 63, 1], rows=(keys, values)).view(0).gather(torch.float32)
        for read, given_rows in zip(found, (keys, values), strict=True):
            error = (read - given_rows)[:, :, 130:].norm() / given_rows[:, :, 130:].norm()
            assert float(error) <= allowed, name


@every_way
@every_format
def test_reorders_add_nothing_and_crops_cut_into_the_packed_part(name: str, way: str) -> None:
    # transformers#45510, #48700: three sequences, groups of 4, 40 tokens.
    model, ids = model_for(way, tiny_llama), random_ids(3, 40)
    cache = small_cache(model, format=name, residual=4, block_tokens=4)
    fed_logits(model, cache, ids, [25, *[1] * 15])
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    for _ in range(21):
        cache.reorder_cache(torch.tensor([1, 2, 0]))
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.truncate(22)
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.check()
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys[[2, 0], :, :22])
        assert torch.equal(layer.values, values[[2, 0], :, :22])
    again = fed_logits(model, cache, ids[[2, 0], 22:], [3, *[1] * 15])
    cache.check()
    assert bool(again.isfinite().all())
    error = (again - uncached_logits(model, ids[[2, 0]])[:, 22:]).abs().max() / again.abs().max()
    assert float(error) <= {"int4": 0.15, "int2": 0.6}[name]


@every_way
@pytest.mark.parametrize("back", ["rollback", "crop"])
def test_a_second_question_over_the_same_text_is_as_after_a_fresh_run(way: str, back: str) -> None:
    # kvpress#27: 20 tokens of text, a question of 3, 4 answers, back to the text, another question.
    model, ids = model_for(way, tiny_llama), random_ids(1, 40)
    cache, fresh = (small_cache(model, format="int4", residual=4, block_tokens=4) for _ in range(2))
    fed_logits(model, cache, ids[:, :20], [13, *[1] * 7])
    fed_logits(model, fresh, ids[:, :20], [13, *[1] * 7])
    mark = cache.checkpoint() if back == "rollback" else None
    if mark is None:
        cache.activate_past_recording()  # nothing is let go until a crop
    fed_logits(model, cache, ids[:, 20:27], [3, *[1] * 4])
    if mark is None:
        cache.crop(-7)
    else:
        cache.rollback(mark)
    assert cache.seen_tokens == 20
    assert cache.layers[0].keys.dtype == torch.float32
    question = random_ids(1, 9, seed=1)
    if mark is None:
        fresh.activate_past_recording()  # from here on as the other
    expected = fed_logits(model, fresh, question, [3, *[1] * 6])
    assert_logits_equal(fed_logits(model, cache, question, [3, *[1] * 6]), expected)


@every_format
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
def test_every_cut_gives_what_rounded_rows_give(make: Any, name: str, layout: str) -> None:
    options: dict[str, Any] = {"capacity": 150} if layout == "contiguous" else {}
    report = verify(make(), random_ids(2, 130), format=name, layout=layout, **options)
    assert report.passed, report.first_divergence


@every_way
@every_format
@pytest.mark.parametrize("policy", [None, Window(6, sinks=2), Window(40)])
def test_attached_models_and_windows_too(name: str, way: str, policy: Window | None) -> None:
    # llama.cpp#5652: keys of few bits under a window with sinks.
    if policy is not None and way == "gathered":
        with pytest.raises(UnsupportedError, match="attach"):
            KVCache.for_model(model_for(way, tiny_llama), format=name, policy=policy)
        return
    report = verify(
        model_for(way, tiny_llama), random_ids(2, 60), format=name, policy=policy, residual=8, block_tokens=8
    )
    assert report.passed, report.first_divergence


@pytest.mark.parametrize(
    ("k_format", "v_format"), [("int4", "fp16"), ("bf16", "int2"), ("int8", "int4"), ("int2", "fp8")]
)
def test_keys_and_values_have_formats_of_their_own(k_format: str, v_format: str) -> None:
    report = verify(tiny_llama(), random_ids(1, 140), k_format=k_format, v_format=v_format)
    assert report.passed, report.first_divergence


@every_format
@pytest.mark.parametrize(("k_dim", "v_dim"), [(24, 16), (20, 20), (5, 3), (1, 1)])
def test_odd_head_dims_are_served(name: str, k_dim: int, v_dim: int) -> None:
    # mlx-vlm#2061: an error at construction or a valid group; never a failure at a later token.
    spec = build_spec([LayerSpec(0, 1, k_dim, v_dim)], k_format=name, v_format=name)
    batch = SequenceBatch(Memory(spec, device=torch.get_default_device()))
    generator = torch.Generator().manual_seed(6)
    for n in [70, *[1] * 70]:
        batch.begin(1, n)
        rows = (drawn(1, 1, n, dim, generator=generator) for dim in (k_dim, v_dim))
        keys, values = batch.write(0, *rows).gather(torch.float32)
    assert (keys.shape, values.shape) == ((1, 1, 140, k_dim), (1, 1, 140, v_dim))
    assert bool(keys.isfinite().all() and values.isfinite().all())


@every_format
def test_cross_attention_is_coded_at_once(name: str) -> None:
    model, ids = tiny_t5(), random_ids(2, 20)
    source: dict[str, Any] = {"input_ids": random_ids(2, 70, seed=1)}
    caches = [small_cache(model, format=name) for _ in range(2)]
    whole, pieces = (
        fed_logits(model, caches[0], ids, **source),
        fed_logits(model, caches[1], ids, [9, *[1] * 11], **source),
    )
    assert_logits_equal(pieces, whole, tolerance=2e-4)  # of its own 20 tokens all are recent


@every_way
@every_format
def test_a_file_has_packed_rows_and_recent_ones(name: str, way: str, tmp_path: Path) -> None:
    model, ids = model_for(way, tiny_llama), random_ids(2, 60)
    cache = small_cache(model, format=name, residual=8, block_tokens=8)
    fed_logits(model, cache, ids[:, :45], [30, *[1] * 15])
    cache.save(tmp_path / "kv")
    loaded = KVCache.load(tmp_path / "kv", model)
    expected = fed_logits(model, cache, ids[:, 45:], [1] * 15)
    assert torch.equal(fed_logits(model, loaded, ids[:, 45:], [1] * 15), expected)
    other = small_cache(model, format=name, residual=16, block_tokens=8)
    with pytest.raises(Exception, match="residual"):
        other.restore(tmp_path / "kv")


def test_what_a_residual_cannot_be_is_said_at_construction() -> None:
    model = tiny_llama()
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"format": "fp16", "residual": 64}, "residual"),
        ({"format": "int8", "residual": -1}, "residual"),
        ({"format": "int4", "residual": 63}, "64 rows together"),
        ({"format": "int4", "residual": 0}, "64 rows together"),
        ({"format": "int4", "residual": 64.5}, "whole number"),
    )
    for options, match in wrong:
        with pytest.raises(ConfigurationError, match=match):
            KVCache.for_model(model, **options)
    assert KVCache.for_model(model, format="int8", residual=32).spec.recents == {0: 1}


def test_rows_that_are_kept_by_hand_are_whole_groups() -> None:
    batch = filled("int4", 200, [199, 1])
    before = batch.view(0).gather(torch.float32)
    with pytest.raises(UnsupportedError, match="64"):
        batch.compact(KeepPlan(((0, 30), (100, 100)), 200))
    for now, then in zip(batch.view(0).gather(torch.float32), before, strict=True):
        assert torch.equal(now, then)
    batch.compact(KeepPlan(((0, 64), (128, 72)), 200))
    batch.memory.check()
    kept = [*range(64), *range(128, 200)]
    for now, then in zip(batch.view(0).gather(torch.float32), before, strict=True):
        assert torch.equal(now, then[:, :, kept])
    with pytest.raises(StateError):
        batch.truncate(100)


@every_format
@pytest.mark.parametrize("block_tokens", [4, 48, 64, 100])
@pytest.mark.parametrize("chunks", [[60], [64], [20, 40], [1] * 90, [24] * 4])
@pytest.mark.parametrize("cut", [10, 17, 40, 70, 130])
def test_rows_stay_at_their_tokens_after_a_deep_cut(name: str, block_tokens: int, chunks: list[int], cut: int) -> None:
    at = torch.arange(400.0)[None, None, :, None]
    noise = drawn(2, 2, 400, 24, generator=torch.Generator().manual_seed(7))
    keys, values = at * 10 + noise, at * 10 + noise[..., :16]
    batch = filled(name, 200, [199, 1], block_tokens=block_tokens, rows=(keys, values))
    batch.truncate(cut)
    start = cut
    for n in chunks:
        batch.begin(2, n)
        batch.write(0, keys[:, :, start : start + n], values[:, :, start : start + n])
        start += n
    batch.memory.check()
    found, _ = batch.view(0).gather(torch.float32)
    # A step of a group is at most 640 over 3 or 15, and rows of the group that was cut are rounded twice.
    assert float((found - keys[:, :, :start]).abs().max()) <= {"int4": 50, "int2": 225}[name]


@every_way
@pytest.mark.parametrize("sinks", [0, 1, 4, 16, 20])
def test_no_rows_are_lost_between_sinks_and_recent_rows(sinks: int, way: str) -> None:
    if way == "gathered":
        return
    model, ids = model_for(way, tiny_llama), random_ids(1, 200)
    policy = Window(150, sinks=sinks)
    exact, cache = (small_cache(model, format=name, policy=policy, block_tokens=64) for name in ("fp32", "int4"))
    expected, found = (fed_logits(model, each, ids, [190, *[1] * 10]) for each in (exact, cache))
    part = cache.batch.view(0).parts[0]
    assert part.n_rows == exact.batch.view(0).parts[0].n_rows
    assert float((found - expected)[:, 191:].norm() / expected[:, 191:].norm()) <= 0.06


@pytest.mark.parametrize("layout", ["growing", "contiguous"])
def test_a_residual_is_held_against_the_blocks_there_are(layout: str) -> None:
    options: dict[str, Any] = {"capacity": 200} if layout == "contiguous" else {}
    with pytest.raises(ConfigurationError, match="64 rows together"):
        KVCache.for_model(tiny_llama(), format="int4", layout=layout, residual=4, block_tokens=4, **options)
    KVCache.for_model(tiny_llama(), format="int4", layout="contiguous", capacity=20, residual=20)


def test_exact_keys_are_exact_among_recent_rows_too() -> None:
    model, ids = tiny_llama(), random_ids(1, 80)
    cache = small_cache(model, k_format="fp32", v_format="int4")
    exact = small_cache(model)
    fed_logits(model, cache, ids)
    fed_logits(model, exact, ids)
    assert torch.equal(cache.layers[0].keys, exact.layers[0].keys)
