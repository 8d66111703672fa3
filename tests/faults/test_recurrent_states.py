"""Fault 44 where states stand beside the rows: a forward that stopped half way has changed what nothing can undo."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from stratakv import KVCache
from stratakv.errors import ConfigurationError, StateError
from stratakv.integrations.transformers import compat
from stratakv.testing.running import assert_logits_equal, fed_logits, uncached_logits
from stratakv.testing.stopping import stopped_forward
from stratakv.verification.zoo import architectures, build_tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # transformers warns of its own deprecations while these models are built
    pytest.mark.skipif(
        not compat.states_go_through_cache,
        reason="this version of transformers gives models with states caches of their own; for_model refuses them",
    ),
]

# (model type, layer at which the forward stops): before the only attention layer, in it, and behind it, where the
# rows are complete and the states are not; in the last, rows and states stand in the same layers.
STOPS = [("jamba", 2), ("jamba", 4), ("jamba", 6), ("qwen3_next", 3), ("falcon_h1", 1), ("lfm2", 2)]


def mamba_of_the_last_layer(model: Any) -> Any:
    return model.model.layers[-1].mamba_decoder


@functools.cache
def hybrid(model_type: str) -> Any:
    return build_tiny(next(a for a in architectures() if a.model_type == model_type and a.kind == "causal-lm"))


@pytest.mark.parametrize(("model_type", "stop"), STOPS)
@pytest.mark.parametrize("seen", [0, 6])
@pytest.mark.parametrize("way_back", ["rollback", "reset"])
def test_a_forward_that_stopped_half_way_is_noticed(model_type: str, stop: int, seen: int, way_back: str) -> None:
    tiny = hybrid(model_type)
    ids = tiny.inputs(12, batch=2, seed=3)["input_ids"]
    cache = KVCache.for_model(tiny.model)
    if seen:
        fed_logits(tiny.model, cache, ids[:, :seen])
    mark = cache.checkpoint()
    layer = tiny.model.model.layers[stop]
    stopped_forward(tiny.model, cache, layer, input_ids=ids[:, seen : seen + 2])
    with pytest.raises(StateError, match="rollback"):
        cache.truncate(seen)
    for verb in (cache.fork, cache.checkpoint):
        with pytest.raises(StateError):
            verb()
    with pytest.raises(StateError):
        fed_logits(tiny.model, cache, ids[:, seen:])
    if way_back == "reset":
        cache.reset()
        fed_logits(tiny.model, cache, ids[:, : max(seen, 1)])
    else:
        cache.rollback(mark)
    start = cache.seen_tokens
    expected = uncached_logits(tiny.model, ids)[:, start:]
    chunks = [1] * (12 - start) if start else [3] + [1] * 9  # some models take several tokens in the first forward only
    assert_logits_equal(fed_logits(tiny.model, cache, ids[:, start:], chunks), expected, tolerance=3e-4)


@pytest.mark.parametrize("model_type", ["jamba", "qwen3_next", "falcon_h1", "zamba2", "inkling_text"])
def test_states_can_go_back_to_a_checkpoint_and_live_in_forks(model_type: str) -> None:
    tiny = hybrid(model_type)
    ids = tiny.inputs(12, batch=2, seed=4)["input_ids"]
    expected = uncached_logits(tiny.model, ids)
    cache = KVCache.for_model(tiny.model)
    fed_logits(tiny.model, cache, ids[:, :5])
    mark, twin = cache.checkpoint(), cache.fork()
    fed_logits(tiny.model, cache, ids.flip(0)[:, 5:9], [1] * 4)
    cache.rollback(mark)
    for each in (cache, twin):
        assert_logits_equal(fed_logits(tiny.model, each, ids[:, 5:], [1] * 7), expected[:, 5:], tolerance=3e-4)
    with pytest.raises(StateError, match=r"recurrent|recording"):
        cache.truncate(8)
    cache.batch_select_indices(torch.tensor([1]))
    cache.check()
    assert cache.batch_size == 1


def test_a_state_that_is_fed_after_the_last_rows_is_missed_where_the_forward_stopped_between() -> None:
    tiny = hybrid("zamba2")
    ids = tiny.inputs(10, seed=6)["input_ids"]
    cache = KVCache.for_model(tiny.model)
    fed_logits(tiny.model, cache, ids[:, :5])
    mark = cache.checkpoint()
    stopped_forward(tiny.model, cache, mamba_of_the_last_layer(tiny.model), input_ids=ids[:, 5:6])
    for refused in (cache.fork, cache.checkpoint, lambda: fed_logits(tiny.model, cache, ids[:, 6:7])):
        with pytest.raises(StateError, match="rollback"):
            refused()
    cache.rollback(mark)
    expected = uncached_logits(tiny.model, ids)[:, 5:]
    assert_logits_equal(fed_logits(tiny.model, cache, ids[:, 5:], [1] * 5), expected, tolerance=3e-4)


def test_sequences_are_chosen_in_rows_and_states_alike_or_not_at_all() -> None:
    tiny = hybrid("lfm2")
    ids = tiny.inputs(9, batch=2, seed=7)["input_ids"]
    expected = uncached_logits(tiny.model, ids)[1:, 6:]
    cache = KVCache.for_model(tiny.model)
    fed_logits(tiny.model, cache, ids[:, :6])
    with pytest.raises(ConfigurationError, match="2 sequences"):
        cache.batch_select_indices(torch.tensor([0, 2]))
    cache.batch_select_indices(torch.tensor([-1]))
    assert_logits_equal(fed_logits(tiny.model, cache, ids[1:, 6:]), expected, tolerance=3e-4)
    cache.batch_select_indices(torch.tensor([], dtype=torch.long))
    assert_logits_equal(fed_logits(tiny.model, cache, ids[1:]), uncached_logits(tiny.model, ids[1:]), tolerance=3e-4)


def test_convolution_states_are_cut_back_where_their_past_was_recorded() -> None:
    tiny = hybrid("lfm2")
    ids = tiny.inputs(12, batch=2, seed=5)["input_ids"]
    cache = KVCache.for_model(tiny.model)
    fed_logits(tiny.model, cache, ids[:, :5])
    with pytest.raises(StateError, match="activate_past_recording"):
        cache.truncate(4)
    cache.activate_past_recording()
    fed_logits(tiny.model, cache, torch.cat([ids[:, 5:6], ids[:, :3]], dim=1))  # one right token and three to take back
    cache.crop(-3)
    expected = uncached_logits(tiny.model, ids)[:, 6:]
    assert_logits_equal(fed_logits(tiny.model, cache, ids[:, 6:], [1, 2, 3]), expected, tolerance=3e-4)
