"""What would be plausible and wrong is refused, and what is refused leaves the cache as it was."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

from stratakv import KVCache, attach
from stratakv.blocks.batch import SequenceBatch
from stratakv.blocks.geometry import build_spec
from stratakv.blocks.memory import Memory
from stratakv.errors import CapacityError, ConfigurationError, FingerprintError, StateError, UnsupportedError
from stratakv.plan import KeepPlan
from stratakv.policies import Window
from stratakv.spec import LayerSpec
from stratakv.testing.running import (
    assert_logits_equal,
    cache_argument,
    fed_logits,
    random_ids,
    uncached_logits,
    visibility_mask,
    window_visibility,
)
from stratakv.testing.stopping import stopped_forward
from stratakv.testing.tiny import tiny_bart, tiny_gemma3, tiny_llama, tiny_mistral
from stratakv.testing.ways import WAYS, model_for, small_cache

every_way = pytest.mark.parametrize("way", WAYS)

# Masks and policies


def test_a_mask_over_all_positions_serves_a_layer_with_a_window() -> None:
    model = model_for("attached", tiny_mistral)
    ids = random_ids(1, 20, seed=90)
    see = window_visibility(20, model.config.sliding_window)
    cache, at, pieces = small_cache(model), 0, []
    for n in (9, 1, 1, 9):
        mask = visibility_mask(see[at : at + n, : at + n])
        pieces.append(fed_logits(model, cache, ids[:, at : at + n], attention_mask=mask))
        at += n
    assert_logits_equal(torch.cat(pieces, 1), uncached_logits(model, ids))


def test_a_mask_of_another_width_is_refused() -> None:
    model = model_for("attached", tiny_llama)
    cache = small_cache(model)
    fed_logits(model, cache, random_ids(1, 6))
    with pytest.raises(UnsupportedError, match="8 columns, where 7"):
        fed_logits(model, cache, random_ids(1, 1), attention_mask=torch.zeros(1, 1, 1, 8))


def test_a_policy_is_not_forgotten_when_the_model_is_detached() -> None:
    model = tiny_llama()
    attachment = attach(model)
    cache = small_cache(model, policy=Window(4, sinks=2))
    attachment.detach()
    with pytest.raises(UnsupportedError, match="attach"):
        fed_logits(model, cache, random_ids(1, 5))
    attach(model)
    fed_logits(model, cache, random_ids(1, 5))


@pytest.mark.parametrize("side", ["left", "right"])
def test_sinks_are_never_padding(side: str) -> None:
    model = model_for("attached", tiny_llama)
    ids = random_ids(2, 12, seed=91)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, slice(0, 4) if side == "left" else slice(8, 12)] = 0
    cache = small_cache(model, policy=Window(5, sinks=2))
    if side == "left":
        with pytest.raises(UnsupportedError, match="padding"):
            fed_logits(model, cache, ids, attention_mask=mask)
        return
    found = fed_logits(model, cache, ids, attention_mask=mask)[1:, :8]
    alone = visibility_mask(window_visibility(8, 5, 2))
    assert_logits_equal(found, uncached_logits(model_for("gathered", tiny_llama), ids[1:, :8], attention_mask=alone))


@pytest.mark.parametrize("runs", [((0, 4), (2, 4)), ((8, 4), (0, 4)), ((0, 4), (6, 0)), ((-1, 2),)])
def test_plans_that_do_not_rise_are_refused(runs: Any) -> None:
    with pytest.raises(ConfigurationError, match="rise"):
        KeepPlan(runs, 0)


def test_a_compaction_cannot_promise_to_be_exact_below_what_it_dropped() -> None:
    model = model_for("attached", tiny_llama)
    cache = small_cache(model)
    fed_logits(model, cache, random_ids(1, 16))
    cache.compact(KeepPlan(((0, 4), (12, 4)), floor=0))
    cache.check()
    with pytest.raises(StateError, match="16"):
        cache.truncate(8)


def test_what_is_no_policy_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="RetentionPolicy"):
        KVCache.for_model(model_for("attached", tiny_llama), policy="window")  # type: ignore[arg-type]  # on purpose


# Gradients, dtypes, models


@every_way
def test_gradients_are_refused_and_not_cut(way: str) -> None:
    model = tiny_llama().requires_grad_(True)
    if way == "attached":
        attach(model)
    logits = model(input_ids=random_ids(1, 6), **cache_argument(model, small_cache(model))).logits
    with pytest.raises(UnsupportedError, match="no gradient"):
        logits.sum().backward()


def test_a_cache_that_stores_exactly_does_not_begin_to_round() -> None:
    model = tiny_llama().to(torch.bfloat16)
    exact, chosen = small_cache(model), small_cache(model, format="bf16")
    model.float()
    with pytest.raises(UnsupportedError, match="exactly"):
        fed_logits(model, exact, random_ids(1, 6))
    assert exact.seen_tokens == 0
    fed_logits(model, chosen, random_ids(1, 6))


def test_autocast_changes_nothing_that_is_stored_or_summed() -> None:
    model, plain = model_for("attached", tiny_llama), model_for("gathered", tiny_llama)
    ids = random_ids(1, 9, seed=92)
    with torch.autocast("cpu", torch.bfloat16):
        found = fed_logits(model, small_cache(model), ids, [5, 4])
        expected = uncached_logits(plain, ids)
    assert_logits_equal(found.float(), expected.float(), tolerance=0.1)


def test_a_model_that_swallows_the_cache_is_refused() -> None:
    config = OpenAIGPTConfig(vocab_size=97, n_positions=64, n_embd=16, n_layer=2, n_head=2)
    with pytest.raises(UnsupportedError, match="takes no cache"):
        KVCache.for_model(OpenAIGPTLMHeadModel(config))


def test_a_forward_without_tokens_or_sequences_is_refused() -> None:
    cache = small_cache(model_for("gathered", tiny_llama))
    for shape in ((1, 2, 0, 8), (0, 2, 3, 8)):
        with pytest.raises(UnsupportedError, match="at least one"):
            cache.update(torch.zeros(shape), torch.zeros(shape), 0)
    assert cache.check().held_bytes == 0


def test_rows_are_repeated_once_at_least() -> None:
    model = model_for("gathered", tiny_llama)
    cache = small_cache(model)
    fed_logits(model, cache, random_ids(2, 6))
    with pytest.raises(ConfigurationError, match="repeats"):
        cache.batch_repeat_interleave(0)
    assert (cache.batch_size, cache.seen_tokens) == (2, 6)


# Encoder-decoders


def test_an_encoder_decoder_whose_first_forward_stopped_goes_back_in_both_halves() -> None:
    model = model_for("gathered", tiny_bart)
    ids, encoder_ids = random_ids(2, 8, seed=93), random_ids(2, 7, seed=94)
    cache = small_cache(model)
    layer = model.get_decoder().layers[1].self_attn
    stopped_forward(model, cache, layer, input_ids=encoder_ids, decoder_input_ids=ids[:, :4])
    with pytest.raises(StateError, match="truncate"):
        cache.batch_select_indices(torch.tensor([0]))
    assert cache.self_attention_cache.batch_size == cache.cross_attention_cache.batch_size == 2
    cache.truncate(0)
    cache.checkpoint().release()
    found = fed_logits(model, cache, ids, [3, 1, 4], input_ids=encoder_ids)
    assert_logits_equal(found, uncached_logits(model, ids, input_ids=encoder_ids))
    cache.batch_select_indices(torch.tensor([], dtype=torch.long))
    found = fed_logits(model, cache, ids[:1], input_ids=encoder_ids[:1])
    assert_logits_equal(found, uncached_logits(model, ids[:1], input_ids=encoder_ids[:1]))


def test_the_memory_of_an_encoder_decoder_is_one_limit_for_both_halves() -> None:
    model = model_for("gathered", tiny_bart)
    cache = small_cache(model, memory=33_000)
    with pytest.raises(CapacityError):
        fed_logits(model, cache, random_ids(1, 64), input_ids=random_ids(1, 18))
    assert cache.nbytes <= 33_000


# Files


def saved(path: Path, **options: Any) -> tuple[Any, torch.Tensor]:
    model, ids = model_for("attached", tiny_llama), random_ids(1, 12, seed=95)
    cache = small_cache(model, **options)
    fed_logits(model, cache, ids)
    cache.save(path, token_ids=ids)
    return model, ids


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": Window(8)}, "policy"),
        ({"layout": "contiguous", "capacity": 32}, "capacity"),
        ({"block_tokens": 8}, "block_tokens"),
        ({"format": "bf16"}, "k_format"),
    ],
)
def test_restore_does_not_make_another_cache_of_this_one(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    layout = {"layout": "contiguous", "capacity": 64} if "layout" in options else {}
    model, _ = saved(tmp_path / "kv", **layout)
    cache = small_cache(model, **options)
    fed_logits(model, cache, random_ids(1, 3))
    with pytest.raises(FingerprintError, match=said):
        cache.restore(tmp_path / "kv")
    assert cache.seen_tokens == 3


def test_restore_keeps_to_the_limit_and_to_the_recording(tmp_path: Path) -> None:
    model, _ = saved(tmp_path / "kv")
    cache = small_cache(model, memory=2048)
    with pytest.raises(CapacityError, match="2,048"):
        cache.restore(tmp_path / "kv")
    cache = small_cache(model, memory="1MiB")
    cache.activate_past_recording()
    cache.restore(tmp_path / "kv")
    assert (cache.seen_tokens, cache.batch.recording, cache.batch.memory.max_bytes) == (12, True, 1 << 20)


def test_a_stopped_forward_does_not_cost_the_known_tokens(tmp_path: Path) -> None:
    model, ids = saved(tmp_path / "kv")
    cache = KVCache.load(tmp_path / "kv", model)
    stopped_forward(model, cache, model.model.layers[1], input_ids=random_ids(1, 2))
    cache.truncate(12)
    assert cache.match_prefix(torch.cat([ids, random_ids(1, 2)], 1)) == 12
    fed_logits(model, cache, random_ids(1, 1))
    assert cache.token_ids is None  # nobody said which token that was


def test_a_prefix_that_left_the_window_is_read_anew(tmp_path: Path) -> None:
    model, ids = model_for("gathered", tiny_mistral), random_ids(1, 30, seed=96)
    cache = small_cache(model)
    fed_logits(model, cache, ids, [10] * 3)
    cache.save(tmp_path / "kv", token_ids=ids)
    cache = KVCache.load(tmp_path / "kv", model)
    prompt = torch.cat([ids[:, :5], random_ids(1, 9, seed=97)], 1)
    assert cache.match_prefix(prompt) == 0
    assert_logits_equal(fed_logits(model, cache, prompt), uncached_logits(model, prompt))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        small_cache(model_for("gathered", tiny_llama)).save(tmp_path / "nowhere" / "kv")


# Memory that several hold


def test_other_heads_are_refused_while_a_fork_holds_rows() -> None:
    model = model_for("gathered", tiny_gemma3)
    cache = small_cache(model)
    fork = cache.fork()
    ids = random_ids(1, 8, seed=98)
    fed_logits(model, fork, ids[:, :6])
    with pytest.raises(UnsupportedError, match="stored"):
        fed_logits(tiny_gemma3(head_dim=16), cache, ids)
    assert_logits_equal(fed_logits(model, fork, ids[:, 6:]), uncached_logits(model, ids)[:, 6:])


@pytest.mark.parametrize("after", range(1, 25))
@pytest.mark.parametrize("verb", ["settle", "check"])
def test_garbage_may_be_collected_at_any_moment(after: int, verb: str) -> None:
    spec = build_spec([LayerSpec(0, 1, 2, 2)], k_format="fp32", v_format="fp32", block_tokens=1)
    memory = Memory(spec, device=torch.get_default_device())
    batches: list[Any] = [SequenceBatch(memory) for _ in range(3)]
    rows = torch.randn(1, 1, 40, 2)
    for batch in batches:
        batch.begin(1, 40)
        batch.write(0, rows, -rows)
    batches[0].reset()
    kept, lost = batches[1], batches[2]
    lost.cycle = lost
    del batches, batch
    thresholds = gc.get_threshold()
    try:
        gc.disable()
        gc.set_threshold(gc.get_count()[0] + after, 10**6, 10**6)
        del lost
        gc.enable()
        getattr(memory, verb)()
        gc.collect()
    finally:
        gc.set_threshold(*thresholds)
        gc.enable()
    memory.check()
    memory.settle()
    memory.check()
    keys, values = kept.view(0).gather(torch.float32)
    assert torch.equal(keys, rows)
    assert torch.equal(values, -rows)
