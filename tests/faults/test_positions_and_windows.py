"""Faults 1 to 7: positions, masks, windows and going back. The oracle is a forward without any cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stratakv.errors import StateError
from stratakv.integrations.transformers.compat import positive_crop_keeps
from stratakv.plan import KeepPlan
from stratakv.testing.running import (
    assert_logits_equal,
    cache_argument,
    fed_logits,
    random_ids,
    uncached_logits,
    visibility_mask,
)
from stratakv.testing.tiny import PAD_ID, tiny_gemma3, tiny_llama, tiny_mistral
from stratakv.testing.ways import LAYOUTS, WAYS, model_for, small_cache

MAKERS = (tiny_llama, tiny_mistral, tiny_gemma3)
every_way = pytest.mark.parametrize("way", WAYS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_model = pytest.mark.parametrize("make", MAKERS)


def padded_step(model: Any, cache: Any, ids: Tensor, mask: Tensor, n_new: int) -> Tensor:
    """Logits of the last `n_new` columns of `ids`; positions are counted over the mask, as `generate` does."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -n_new:]
    with torch.no_grad():
        output = model(
            input_ids=ids[:, -n_new:],
            attention_mask=mask,
            position_ids=positions,
            **cache_argument(model, cache),
            use_cache=True,
        )
    cache.check()
    logits: Tensor = output.logits
    return logits


# 1. Padding


@every_way
@every_layout
@every_model
def test_left_padded_rows_equal_the_unpadded_ones(make: Any, layout: str, way: str) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    short, long = random_ids(1, 10, seed=1), random_ids(1, 12, seed=2)
    ids = torch.cat([torch.cat([torch.full((1, 2), PAD_ID), short], 1), long])  # prompts of 3 and 5, then single tokens
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    cache = small_cache(model, layout)
    pieces = [padded_step(model, cache, ids[:, :5], mask[:, :5], 5)]
    pieces += [padded_step(model, cache, ids[:, :n], mask[:, :n], 1) for n in range(6, 13)]
    found = torch.cat(pieces, 1)
    assert_logits_equal(found[:1, 2:], uncached_logits(plain, short))
    assert_logits_equal(found[1:], uncached_logits(plain, long))


@every_way
@every_layout
def test_pads_in_the_middle_are_invisible(layout: str, way: str) -> None:
    model, plain = model_for(way, tiny_llama), model_for("gathered", tiny_llama)
    first, second = random_ids(2, 4, seed=3), random_ids(2, 6, seed=4)
    n_pads = (3, 1)  # the second chunk is left-padded in its turn
    ids = torch.cat([first, second], 1)
    mask = torch.ones_like(ids)
    for row, n in enumerate(n_pads):
        ids[row, 4 : 4 + n], mask[row, 4 : 4 + n] = PAD_ID, 0
    cache = small_cache(model, layout)
    padded_step(model, cache, ids[:, :4], mask[:, :4], 4)
    found = torch.cat(
        [padded_step(model, cache, ids[:, :9], mask[:, :9], 5), padded_step(model, cache, ids, mask, 1)], 1
    )
    for row, n in enumerate(n_pads):
        unpadded = torch.cat([ids[row : row + 1, :4], ids[row : row + 1, 4 + n :]], 1)
        assert_logits_equal(found[row : row + 1, n:], uncached_logits(plain, unpadded)[:, 4:])


@every_way
@every_layout
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
def test_right_padding_is_cut_off_or_masked(make: Any, layout: str, way: str) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    ids = random_ids(2, 9, seed=5)
    ids[0, 4:6] = PAD_ID  # prompts of 4 and 6, padded on the right; the new tokens come behind the pads
    mask = torch.ones_like(ids)
    mask[0, 4:6] = 0
    cache = small_cache(model, layout)
    found = torch.cat(
        [padded_step(model, cache, ids[:, :6], mask[:, :6], 6)]
        + [padded_step(model, cache, ids[:, :n], mask[:, :n], 1) for n in (7, 8, 9)],
        1,
    )
    assert_logits_equal(found[1:], uncached_logits(plain, ids[1:]))
    assert_logits_equal(found[:1, :4], uncached_logits(plain, ids[:1, :4]))
    if make is tiny_llama:  # a model's window counts columns, pads among them, so there the row would see less
        unpadded = torch.cat([ids[:1, :4], ids[:1, 6:]], 1)
        assert_logits_equal(found[:1, 6:], uncached_logits(plain, unpadded)[:, 4:])


# 2. Tokens seen and rows stored


def kept_visibility(n_tokens: int, prefill: int, kept: set[int]) -> Tensor:
    """bool `[n_tokens, n_tokens]`: from position `prefill` on, of the prefill only the kept rows are seen."""
    see = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()
    gone = [p for p in range(prefill) if p not in kept]
    see[prefill:, gone] = False
    return see


@every_layout
@pytest.mark.parametrize("runs", [((12, 6),), ((0, 2), (14, 4)), ((0, 4), (8, 2)), ((1, 1), (3, 2), (17, 1))])
@pytest.mark.parametrize("n_sequences", [1, 3])
def test_positions_go_on_after_rows_were_dropped(
    runs: tuple[tuple[int, int], ...], layout: str, n_sequences: int
) -> None:
    model, plain = model_for("attached", tiny_llama), model_for("gathered", tiny_llama)
    ids = random_ids(n_sequences, 21, seed=6)
    cache = small_cache(model, layout)
    fed_logits(model, cache, ids[:, :18])
    kept = [p for first, count in runs for p in range(first, first + count)]
    cache.compact(KeepPlan(runs=runs, floor=18))
    cache.check()
    assert (cache.seen_tokens, cache.stored_tokens) == (18, len(kept))
    pieces = []
    for n in (1, 2, 3):
        pieces.append(fed_logits(model, cache, ids[:, 17 + n : 18 + n]))
        view = cache.batch.view(1)
        assert view.n_rows == len(kept) + n
        assert view.parts[0].positions().tolist() == [*kept, *range(18, 18 + n)]
        assert (cache.seen_tokens, cache.stored_tokens) == (18 + n, len(kept) + n)
        assert cache.get_seq_length() == 18 + n
    expected = uncached_logits(plain, ids, attention_mask=visibility_mask(kept_visibility(21, 18, set(kept))))
    assert_logits_equal(torch.cat(pieces, 1), expected[:, 18:])


def test_a_padding_mask_still_fits_after_rows_were_dropped() -> None:
    model, plain = model_for("attached", tiny_llama), model_for("gathered", tiny_llama)
    ids = random_ids(2, 20, seed=7)
    ids[0, :5] = PAD_ID
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    cache = small_cache(model)
    padded_step(model, cache, ids[:, :18], mask[:, :18], 18)
    cache.compact(KeepPlan(runs=((3, 4), (12, 6)), floor=18))
    found = torch.cat([padded_step(model, cache, ids[:, :n], mask[:, :n], 1) for n in (19, 20)], 1)
    see = kept_visibility(20, 18, {3, 4, 5, 6, *range(12, 18)})
    assert_logits_equal(found[1:], uncached_logits(plain, ids[1:], attention_mask=visibility_mask(see))[:, 18:])
    assert_logits_equal(
        found[:1], uncached_logits(plain, ids[:1, 5:], attention_mask=visibility_mask(see[5:, 5:]))[:, 13:]
    )


# 5. Going back


def gone_back(cache: Any, verb: str, n_remove: int) -> None:
    if verb == "crop":
        cache.crop(-n_remove)
    elif verb == "truncate":
        cache.truncate(max(cache.seen_tokens - n_remove, 0))
    else:
        assert positive_crop_keeps
        cache.crop(cache.seen_tokens - n_remove)
    cache.check()


@every_way
@every_layout
@every_model
@pytest.mark.parametrize("verb", ["crop", "truncate"])
@pytest.mark.parametrize("n_remove", [0, 1, 2, 3, 5])
def test_a_crop_leaves_no_stale_row(make: Any, layout: str, way: str, verb: str, n_remove: int) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    ids = random_ids(2, 5, seed=8)
    cache = small_cache(model, layout)
    fed_logits(model, cache, ids[:, :3])
    gone_back(cache, verb, n_remove)
    left = max(3 - n_remove, 0)
    assert (cache.seen_tokens, cache.get_seq_length(), cache.stored_tokens) == (left, left, left)
    found = fed_logits(model, cache, ids[:, 3:])
    expected = uncached_logits(plain, torch.cat([ids[:, :left], ids[:, 3:]], 1))
    assert_logits_equal(found, expected[:, left:])


@pytest.mark.skipif(
    not positive_crop_keeps, reason="from 5.15 on a positive crop is an error, which the next test covers"
)
def test_a_positive_crop_keeps_so_many_tokens() -> None:
    model = model_for("gathered", tiny_llama)
    ids = random_ids(1, 12, seed=9)
    cache = small_cache(model)
    fed_logits(model, cache, ids[:, :10])
    cache.crop(4)
    assert cache.seen_tokens == 4
    assert_logits_equal(
        fed_logits(model, cache, ids[:, 10:]), uncached_logits(model, torch.cat([ids[:, :4], ids[:, 10:]], 1))[:, 4:]
    )
    cache.crop(400)
    assert cache.seen_tokens == 6


@pytest.mark.skipif(positive_crop_keeps, reason="before 5.15 a positive crop keeps, which the test before covers")
def test_a_positive_crop_is_refused_and_changes_nothing() -> None:
    model = model_for("gathered", tiny_llama)
    ids = random_ids(1, 12, seed=9)
    cache = small_cache(model)
    fed_logits(model, cache, ids[:, :10])
    with pytest.raises(ValueError, match="truncate"):
        cache.crop(4)
    assert_logits_equal(fed_logits(model, cache, ids[:, 10:]), uncached_logits(model, ids)[:, 10:])


@pytest.mark.parametrize("n_tokens", [-1, 11])
def test_a_truncation_to_what_was_never_seen_is_refused(n_tokens: int) -> None:
    model = model_for("gathered", tiny_llama)
    ids = random_ids(1, 12, seed=10)
    cache = small_cache(model)
    fed_logits(model, cache, ids[:, :10])
    with pytest.raises(StateError, match=r"seen 10 tokens"):
        cache.truncate(n_tokens)
    assert_logits_equal(fed_logits(model, cache, ids[:, 10:]), uncached_logits(model, ids)[:, 10:])


# 6. A ring cannot go back beyond what it holds


@every_way
@pytest.mark.parametrize("make", [lambda: tiny_mistral(window=8), lambda: tiny_gemma3(window=8)])
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [17, 3], [11, 9], [3] * 6 + [2]])
@pytest.mark.parametrize("n_remove", [1, 3, 6, 12])
def test_a_window_goes_back_exactly_or_refuses(make: Any, way: str, chunks: list[int], n_remove: int) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    ids = random_ids(2, 24, seed=11)
    cache = small_cache(model)
    fed_logits(model, cache, ids[:, :20], chunks)
    left = 20 - n_remove
    try:
        cache.crop(-n_remove)
    except StateError:
        assert cache.seen_tokens == 20
        assert_logits_equal(fed_logits(model, cache, ids[:, 20:], [1, 3]), uncached_logits(plain, ids)[:, 20:])
    else:
        fresh = torch.cat([ids[:, :left], ids[:, 21:]], 1)
        assert_logits_equal(fed_logits(model, cache, ids[:, 21:], [1, 2]), uncached_logits(plain, fresh)[:, left:])


@every_way
def test_a_window_that_lost_rows_refuses(way: str) -> None:
    model = model_for(way, tiny_mistral)
    cache = small_cache(model)
    fed_logits(model, cache, random_ids(1, 20), [1] * 20)
    with pytest.raises(StateError, match="shortest exact length"):
        cache.crop(-8)
    cache.crop(-20)  # an empty cache is always exact
    assert cache.seen_tokens == 0
    assert_logits_equal(fed_logits(model, cache, random_ids(1, 6)), uncached_logits(model, random_ids(1, 6)))


@every_way
@pytest.mark.parametrize("make", [tiny_mistral, tiny_gemma3])
@pytest.mark.parametrize("chunks", [[9], [3, 3, 3], [1] * 9])
def test_while_recording_a_window_goes_back_as_far_as_the_drafts(make: Any, way: str, chunks: list[int]) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    ids = random_ids(1, 30, seed=12)
    cache = small_cache(model)
    cache.activate_past_recording()
    fed_logits(model, cache, ids[:, :11])
    cache.crop(0)
    drafts = random_ids(1, 9, seed=13)
    fed_logits(model, cache, drafts, chunks)
    cache.crop(-8)
    so_far = torch.cat([ids[:, :11], drafts[:, :1]], 1)
    more = ids[:, 11:17]
    expected = uncached_logits(plain, torch.cat([so_far, more], 1))[:, 12:]
    assert_logits_equal(fed_logits(model, cache, more, [1, 2, 3]), expected)


# 7. Drafts in preallocated storage


@every_way
@every_layout
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
def test_rejected_drafts_are_invisible_and_storage_stays(make: Any, layout: str, way: str) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    ids = random_ids(1, 5, seed=14)
    cache = small_cache(model, layout, **({"capacity": 16} if layout == "contiguous" else {}))
    cache.activate_past_recording()
    first = int(fed_logits(model, cache, ids)[0, -1].argmax())
    cache.crop(0)

    def addresses() -> list[int]:
        return [t.data_ptr() for arena in cache.batch.memory.arenas for slab in arena.slabs for t in slab.members]

    before = addresses()
    text = torch.cat([ids, torch.tensor([[first]])], 1)
    while text.shape[1] < 12:
        second = int(uncached_logits(plain, text)[0, -1].argmax())
        drafts = torch.tensor([[second, (second + 7) % 90 + 2, 5, 6]])  # the first is right, the others are not
        verified = fed_logits(model, cache, torch.cat([text[:, -1:], drafts], 1))
        expected = uncached_logits(plain, torch.cat([text, drafts], 1))[:, -5:]
        assert_logits_equal(verified, expected)
        cache.crop(-3)
        cache.check()
        text = torch.cat([text, drafts[:, :1], verified[:, 1].argmax(-1, keepdim=True)], 1)
        assert cache.seen_tokens == text.shape[1] - 1
    if layout == "contiguous" and make is tiny_llama:
        assert addresses() == before
    greedy = ids
    for _ in range(text.shape[1] - 5):
        greedy = torch.cat([greedy, uncached_logits(plain, greedy)[:, -1].argmax(-1, keepdim=True)], 1)
    assert text.tolist() == greedy.tolist()
