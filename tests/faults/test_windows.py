"""Faults 3 and 4: what a window hides, the model's own or a policy's; rows are let go after attending, not before."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from stratakv.errors import UnsupportedError
from stratakv.policies import Window
from stratakv.testing.running import (
    assert_logits_equal,
    fed_logits,
    random_ids,
    uncached_logits,
    visibility_mask,
    window_visibility,
)
from stratakv.testing.tiny import tiny_gemma3, tiny_llama, tiny_mistral
from stratakv.testing.ways import WAYS, model_for, small_cache

one_layer_llama = functools.partial(tiny_llama, num_hidden_layers=1)
one_layer_mistral = functools.partial(tiny_mistral, num_hidden_layers=1)
FEEDS = {"one-shot": [10], "chunks of 3": [3, 3, 3, 1], "decode": [1] * 10, "prefill and decode": [6, 1, 1, 1, 1]}
every_way = pytest.mark.parametrize("way", WAYS)
every_feed = pytest.mark.parametrize("feed", FEEDS)
POLICIES = {"window": Window(4), "sinks": Window(4, sinks=2), "window of 1": Window(1), "wide": Window(7, sinks=5)}


def policy_oracle(ids: Tensor, policy: Window, n_query_heads: int = 4, n_kv_heads: int = 2) -> Tensor:
    """Logits of the full-attention model under an explicit mask, one for each query head."""
    see = []
    for head in range(n_query_heads):
        kept = policy.retention(0, head // (n_query_heads // n_kv_heads))
        assert kept.window is not None
        see.append(window_visibility(ids.shape[1], kept.window, kept.sinks))
    return uncached_logits(model_for("gathered", tiny_llama), ids, attention_mask=visibility_mask(torch.stack(see)))


# 3. The edge of a window


@pytest.mark.parametrize(
    ("way", "make", "policy"),
    [
        ("gathered", one_layer_mistral, None),
        ("attached", one_layer_mistral, None),
        ("attached", one_layer_llama, Window(4)),
    ],
)
@every_feed
@pytest.mark.parametrize("query", [4, 5, 8, 9])
def test_the_edge_of_a_window_is_exact(way: str, make: Any, policy: Window | None, feed: str, query: int) -> None:
    model = model_for(way, make)

    def last_logits(changed: int | None) -> Tensor:
        ids = random_ids(1, 10, seed=20)
        if changed is not None:
            ids[0, changed] = (ids[0, changed] + 11) % 90 + 2
        return fed_logits(model, small_cache(model, policy=policy), ids, FEEDS[feed])[0, query]

    as_it_is = last_logits(None)
    assert (last_logits(query - 3) - as_it_is).abs().max() > 1e-2
    assert_logits_equal(last_logits(query - 4), as_it_is, tolerance=1e-6)


@every_way
@every_feed
@pytest.mark.parametrize(
    "make", [tiny_mistral, lambda: tiny_mistral(window=1), tiny_gemma3, lambda: tiny_gemma3(window=3)]
)
def test_the_models_own_window(make: Any, way: str, feed: str) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    ids = random_ids(2, 10, seed=21)
    found = fed_logits(model, small_cache(model), ids, FEEDS[feed])
    assert_logits_equal(found, uncached_logits(plain, ids))


@every_feed
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("block_tokens", [1, 3, 4, 16])
def test_a_policys_window(name: str, feed: str, block_tokens: int) -> None:
    model = model_for("attached", tiny_llama)
    ids = random_ids(2, 10, seed=22)
    cache = small_cache(model, policy=POLICIES[name], block_tokens=block_tokens)
    assert_logits_equal(fed_logits(model, cache, ids, FEEDS[feed]), policy_oracle(ids, POLICIES[name]))


@every_feed
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("sizes", [(4, 6), (6, 4), (1, 9), (4, 4)])
def test_a_window_for_each_head(sizes: tuple[int, int], sinks: int, feed: str) -> None:
    model = model_for("attached", tiny_llama)
    ids = random_ids(2, 10, seed=23)
    policy = Window(sizes, sinks)
    cache = small_cache(model, policy=policy)
    assert_logits_equal(fed_logits(model, cache, ids, FEEDS[feed]), policy_oracle(ids, policy))


def test_a_policys_window_lets_a_hybrids_own_windows_be() -> None:
    model, plain = model_for("attached", tiny_gemma3), model_for("gathered", tiny_gemma3)
    ids = random_ids(1, 14, seed=24)
    found = fed_logits(model, small_cache(model, policy=Window(6, sinks=1)), ids, [5, 1, 3, 1, 4])
    own, imposed = (visibility_mask(window_visibility(14, *args)) for args in ((5,), (6, 1)))
    masks = {"sliding_attention": own, "full_attention": imposed}
    assert_logits_equal(found, uncached_logits(plain, ids, attention_mask=masks))


def test_a_policy_without_our_attention_is_refused_at_once() -> None:
    with pytest.raises(UnsupportedError, match="attach"):
        small_cache(model_for("gathered", tiny_llama), policy=Window(4))


# 4. A window over several turns


@every_way
@pytest.mark.parametrize("make", [tiny_mistral, lambda: tiny_gemma3(window=4)])
@pytest.mark.parametrize("second_turn", [[6], [2, 4], [5, 1]])
def test_a_second_turn_after_a_window_was_left(make: Any, way: str, second_turn: list[int]) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    ids = random_ids(2, 20, seed=25)
    cache = small_cache(model)
    found = fed_logits(model, cache, ids, [11, 1, 1, 1, *second_turn])
    assert_logits_equal(found, uncached_logits(plain, ids))


@pytest.mark.parametrize("policy", [Window(4), Window(4, sinks=2), Window((4, 6)), Window((3, 9), sinks=5)])
@pytest.mark.parametrize("second_turn", [[6], [2, 4], [5, 1]])
def test_a_second_turn_after_a_policys_window_was_left(policy: Window, second_turn: list[int]) -> None:
    model = model_for("attached", tiny_llama)
    ids = random_ids(2, 20, seed=26)
    found = fed_logits(model, small_cache(model, policy=policy), ids, [11, 1, 1, 1, *second_turn])
    assert_logits_equal(found, policy_oracle(ids, policy))


@every_way
def test_rows_far_outside_a_window_are_let_go(way: str) -> None:
    model, plain = model_for(way, tiny_mistral), model_for("gathered", tiny_mistral)
    ids = random_ids(1, 60, seed=27)
    cache = small_cache(model)
    assert_logits_equal(fed_logits(model, cache, ids, [9] + [1] * 51), uncached_logits(plain, ids))
    assert cache.seen_tokens == 60
    assert cache.stored_tokens <= 4 + 4  # the window, and what fills up the blocks at its ends
