"""A forward is a transaction: it happens whole, or the cache can be brought back to where it was."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from stratakv.errors import StateError, StrataKVError
from stratakv.extension import is_built
from stratakv.integrations.transformers.attention import attention_forward
from stratakv.testing.running import assert_logits_equal, fed_logits, random_ids, uncached_logits
from stratakv.testing.stopping import stopped_forward
from stratakv.testing.tiny import tiny_bart, tiny_gemma2, tiny_gemma3, tiny_llama, tiny_mistral, tiny_t5
from stratakv.testing.ways import LAYOUTS, WAYS, model_for, small_cache

every_way = pytest.mark.parametrize("way", WAYS)
needs_extension = pytest.mark.skipif(not is_built(), reason="installed without the extension, or for want of g++")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@every_way
@every_layout
@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral, tiny_gemma3])
@pytest.mark.parametrize("seen", [0, 6, 8])
@pytest.mark.parametrize("way_back", ["truncate", "rollback", "reset"])
def test_a_forward_that_stopped_half_way(make: Any, layout: str, way: str, seen: int, way_back: str) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    ids = random_ids(2, 15, seed=70)
    cache = small_cache(model, layout)
    if seen:
        fed_logits(model, cache, ids[:, :seen])
    mark = cache.checkpoint()
    stopped_forward(model, cache, model.model.layers[1], input_ids=random_ids(2, 5, seed=71))
    assert cache.seen_tokens == seen
    assert cache.stored_tokens == seen or make is tiny_mistral  # where all layers have a window, fewer rows are held
    with pytest.raises(StateError, match=rf"truncate\({seen}\)"):
        fed_logits(model, cache, ids[:, seen:])
    if way_back == "rollback":
        cache.rollback(mark)
    elif way_back == "reset":
        cache.reset()
        fed_logits(model, cache, ids[:, : seen or 1])
    else:
        cache.truncate(seen)
    cache.check()
    start = cache.seen_tokens
    assert_logits_equal(
        fed_logits(model, cache, ids[:, start:], [1, 14 - start]), uncached_logits(plain, ids)[:, start:]
    )


@every_way
@pytest.mark.parametrize("verb", ["fork", "checkpoint", "batch_repeat_interleave"])
def test_what_would_share_a_half_done_forward_is_refused(way: str, verb: str) -> None:
    model, plain = model_for(way, tiny_llama), model_for("gathered", tiny_llama)
    ids = random_ids(1, 8, seed=72)
    cache = small_cache(model)
    fed_logits(model, cache, ids[:, :6])
    stopped_forward(model, cache, model.model.layers[1], input_ids=ids[:, 6:])
    with pytest.raises(StateError, match=r"truncate\(6\)"):
        getattr(cache, verb)(*((2,) if verb == "batch_repeat_interleave" else ()))
    cache.truncate(6)
    assert_logits_equal(fed_logits(model, cache, ids[:, 6:]), uncached_logits(plain, ids)[:, 6:])


def test_another_batch_size_is_refused_and_changes_nothing() -> None:
    model = model_for("gathered", tiny_llama)
    ids = random_ids(2, 8, seed=73)
    cache = small_cache(model)
    fed_logits(model, cache, ids[:, :6])
    with pytest.raises(StateError, match="2 sequences"):
        fed_logits(model, cache, random_ids(3, 2))
    assert_logits_equal(fed_logits(model, cache, ids[:, 6:]), uncached_logits(model, ids)[:, 6:])


def test_a_cache_whose_sequences_were_all_dropped_starts_anew() -> None:
    model = model_for("gathered", tiny_llama)
    cache = small_cache(model)
    fed_logits(model, cache, random_ids(2, 6, seed=74))
    cache.batch_select_indices(torch.tensor([], dtype=torch.long))
    cache.check()
    assert cache.seen_tokens == cache.stored_tokens == 0
    ids = random_ids(3, 5, seed=75)
    assert_logits_equal(fed_logits(model, cache, ids), uncached_logits(model, ids))


def test_tickets_of_an_earlier_step_are_refused() -> None:
    model = model_for("attached", tiny_llama)
    cache = small_cache(model)
    attention = model.model.layers[0].self_attn
    new = torch.randn(1, 2, 3, 8)
    key, value = cache.update(new, new, 0)
    query = torch.randn(1, 4, 3, 8)
    out, _ = attention_forward(attention, query, key, value, None)
    assert torch.isfinite(out).all()
    again, _ = attention_forward(attention, query, key, value, None)  # layers that share KV attend to it once more
    assert torch.equal(out, again)
    cache.update(new, new, 1)
    cache.update(new, new, 0)
    with pytest.raises(StateError, match="earlier step"):
        attention_forward(attention, query, key, value, None)


@pytest.mark.parametrize("verb", ["truncate", "reset", "reorder", "rollback", "compact"])
def test_tickets_do_not_outlive_a_change(verb: str) -> None:
    from stratakv.plan import KeepPlan

    model = model_for("attached", tiny_llama)
    cache = small_cache(model)
    mark = cache.checkpoint()
    new = torch.randn(1, 2, 6, 8)
    key, value = cache.update(new, new, 0)
    cache.update(new, new, 1)
    actions: dict[str, Any] = {
        "truncate": lambda: cache.truncate(3),
        "reset": cache.reset,
        "reorder": lambda: cache.reorder_cache(torch.tensor([0])),
        "rollback": lambda: cache.rollback(mark),
        "compact": lambda: cache.compact(KeepPlan(((0, 2),), 6)),
    }
    actions[verb]()
    with pytest.raises(StateError, match="earlier step"):
        attention_forward(model.model.layers[0].self_attn, torch.randn(1, 4, 6, 8), key, value, None)


@pytest.mark.parametrize("half", ["key", "value"])
def test_a_ticket_that_was_touched_is_nan(half: str) -> None:
    model = model_for("attached", tiny_llama)
    cache = small_cache(model)
    new = torch.randn(1, 2, 3, 8)
    key, value = cache.update(new, new, 0)
    key, value = (key * 2, value) if half == "key" else (key, value + 1)
    out, _ = attention_forward(model.model.layers[0].self_attn, torch.randn(1, 4, 3, 8), key, value, None)
    assert torch.isnan(out).any()


def test_a_detached_model_never_takes_a_ticket_for_numbers() -> None:
    from stratakv.integrations.transformers import attach

    model = tiny_llama()
    ids = random_ids(1, 9, seed=76)
    expected = uncached_logits(model, ids)
    attachment = attach(model)
    cache = small_cache(model)
    pieces = [fed_logits(model, cache, ids[:, :4])]
    attachment.detach()
    pieces.append(fed_logits(model, cache, ids[:, 4:6]))
    attach(model)
    pieces.append(fed_logits(model, cache, ids[:, 6:8]))
    attach(model).detach()  # the second attachment of an attached model knows the way back too
    assert not cache.is_attached
    pieces.append(fed_logits(model, cache, ids[:, 8:]))
    assert_logits_equal(torch.cat(pieces, 1), expected)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2])  # of the latter sdpa would leave the softcap out
@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_extension)])
def test_whoever_detaches_gives_back_what_was_there_before_the_first_attachment(make: Any, native: bool) -> None:
    from stratakv.integrations.transformers import attach

    model, ids = make(), random_ids(1, 9, seed=77)
    model.set_attn_implementation("eager")
    expected = uncached_logits(model, ids)
    attach(model, native=native)
    twin = deepcopy(model)
    for attached in (model, twin):
        attach(attached, native=native)
        again = attach(attached, native=native)
        assert again.is_native == native
        again.detach()
        assert attached.config._attn_implementation == "eager"
        assert torch.equal(uncached_logits(attached, ids), expected)
        assert vars(attached).keys() == vars(make()).keys()


def test_what_was_chosen_between_two_attachments_is_given_back() -> None:
    from stratakv.integrations.transformers import attach

    model = tiny_llama()
    for chosen in ("eager", "sdpa"):
        model.set_attn_implementation(chosen)
        attach(model).detach()
        assert model.config._attn_implementation == chosen


# Encoder-decoders


@pytest.mark.parametrize("make", [tiny_t5, tiny_bart])
def test_a_bare_decoder_cache_is_refused_by_an_encoder_decoder(make: Any) -> None:
    model = model_for("gathered", make)
    pair = small_cache(model)
    with pytest.raises(StrataKVError, match="EncoderDecoderKVCache"):
        fed_logits(model, pair.self_attention_cache, random_ids(1, 3), input_ids=random_ids(1, 5))


@every_layout
@pytest.mark.parametrize("make", [tiny_t5, tiny_bart])
@pytest.mark.parametrize("seen", [0, 6])
@pytest.mark.parametrize("other_encoder", [False, True])
def test_an_encoder_decoder_that_stopped_half_way(make: Any, layout: str, seen: int, other_encoder: bool) -> None:
    model = model_for("gathered", make)
    ids, encoder_ids = random_ids(2, 10, seed=77), random_ids(2, 7, seed=78)
    cache = small_cache(model, layout)
    if seen:
        fed_logits(model, cache, ids[:, :seen], input_ids=encoder_ids)
    layer = model.get_decoder().block[1] if make is tiny_t5 else model.get_decoder().layers[1]
    stopped_forward(model, cache, layer, input_ids=encoder_ids, decoder_input_ids=ids[:, seen:])
    with pytest.raises(StateError, match="truncate"):
        fed_logits(model, cache, ids[:, seen:], input_ids=encoder_ids)
    if other_encoder:
        cache.reset()
        encoder_ids, seen = random_ids(2, 9, seed=79), 0
    else:
        cache.truncate(seen)
    cache.check()
    found = fed_logits(model, cache, ids[:, seen:], [1, 9 - seen], input_ids=encoder_ids)
    assert_logits_equal(found, uncached_logits(model, ids, input_ids=encoder_ids)[:, seen:])


@every_layout
@pytest.mark.parametrize("make", [tiny_t5, tiny_bart])
def test_forks_and_checkpoints_of_an_encoder_decoder(make: Any, layout: str) -> None:
    model = model_for("gathered", make)
    ids, encoder_ids = random_ids(2, 12, seed=80), random_ids(2, 7, seed=81)
    cache = small_cache(model, layout)
    fed_logits(model, cache, ids[:, :6], input_ids=encoder_ids)
    twin, mark = cache.fork(), cache.checkpoint()
    other = torch.cat([ids[:, :6], random_ids(2, 4, seed=82)], 1)
    expected = uncached_logits(model, other, input_ids=encoder_ids)[:, 6:]
    assert_logits_equal(fed_logits(model, twin, other[:, 6:], [1, 3], input_ids=encoder_ids), expected)
    # Rows of the encoder stored twice would leave the logits alone: every weight halves, every value counts twice.
    assert twin.cross_attention_cache.stored_tokens == cache.cross_attention_cache.stored_tokens == 7
    for _ in range(2):
        expected = uncached_logits(model, ids, input_ids=encoder_ids)[:, 6:]
        assert_logits_equal(fed_logits(model, cache, ids[:, 6:], [2, 4], input_ids=encoder_ids), expected)
        cache.rollback(mark)
        cache.check()
        assert (cache.seen_tokens, cache.cross_attention_cache.stored_tokens) == (6, 7)
