"""`generate` with our cache gives what it gives with no cache at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stratakv.testing.running import assert_logits_equal, cache_argument, fed_logits, random_ids, uncached_logits
from stratakv.testing.tiny import PAD_ID, VOCABULARY, tiny_bart, tiny_gemma3, tiny_llama, tiny_mistral, tiny_t5
from stratakv.testing.ways import LAYOUTS, WAYS, model_for, small_cache

DECODERS = (tiny_llama, tiny_mistral, tiny_gemma3)
ENCODER_DECODERS = (tiny_t5, tiny_bart)
N_NEW = 12
every_way = pytest.mark.parametrize("way", WAYS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_decoder = pytest.mark.parametrize("make", DECODERS)


def prompts(n_pads: tuple[int, ...], n_tokens: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids `[n, n_tokens]`, row i left-padded with `n_pads[i]` pads, and the mask."""
    ids = random_ids(len(n_pads), n_tokens, seed)
    mask = torch.ones_like(ids)
    for row, n in enumerate(n_pads):
        ids[row, :n], mask[row, :n] = PAD_ID, 0
    return ids, mask


def generated(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    """What `generate` gives, with the scores before any processing."""
    torch.manual_seed(7)
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=options.pop("max_new_tokens", N_NEW),
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def assert_same_run(found: Any, expected: Any) -> None:
    """The same tokens, and the same numbers that they were chosen by."""
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert len(found.logits) == len(expected.logits) == N_NEW
    assert_logits_equal(torch.stack(found.logits), torch.stack(expected.logits))


def assert_choices_are_clear(run: Any) -> None:
    """Greedy choices stand so far before the runner-up that rounding cannot swap them: equal tokens then mean much."""
    best = torch.stack(run.logits).topk(2, dim=-1).values
    assert float((best[..., 0] - best[..., 1]).min()) > 1e-4


@every_way
@every_layout
@every_decoder
@pytest.mark.parametrize("n_pads", [(0,), (0, 3, 1)])
def test_greedy(make: Any, layout: str, way: str, n_pads: tuple[int, ...]) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    ids, mask = prompts(n_pads)
    cache = small_cache(model, layout)
    found = generated(model, ids, mask, **cache_argument(model, cache))
    cache.check()
    assert cache.seen_tokens == ids.shape[1] + N_NEW - 1
    assert_same_run(found, generated(plain, ids, mask, use_cache=False))


@every_way
@every_layout
@every_decoder
@pytest.mark.parametrize("n_return", [1, 3])
def test_beam_search(make: Any, layout: str, way: str, n_return: int) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    ids, mask = prompts((0, 2), seed=1)
    options = {"num_beams": 3, "num_return_sequences": n_return, "output_scores": True}
    cache = small_cache(model, layout)
    found = generated(model, ids, mask, **cache_argument(model, cache), **options)
    cache.check()
    expected = generated(plain, ids, mask, use_cache=False, **options)
    assert_same_run(found, expected)
    assert_logits_equal(found.sequences_scores, expected.sequences_scores)


@every_way
@every_decoder
def test_sampling_with_a_seed(make: Any, way: str) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    ids, mask = prompts((0, 2), seed=2)
    options = {"do_sample": True, "temperature": 1.5, "top_k": 0, "num_return_sequences": 3}
    cache = small_cache(model)
    found = generated(model, ids, mask, **cache_argument(model, cache), **options)
    cache.check()
    assert len({tuple(row) for row in found.sequences.tolist()}) == 6
    assert_same_run(found, generated(plain, ids, mask, use_cache=False, **options))


@every_way
@every_layout
@every_decoder
def test_assisted_decoding(make: Any, layout: str, way: str) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    ids, mask = prompts((0,), seed=3)
    expected = generated(plain, ids, mask, use_cache=False)
    assert_choices_are_clear(expected)
    # A twin proposes drafts that are all taken, another model such as are mostly not.
    for assistant in (make(), make(seed=1)):
        cache = small_cache(model, layout)
        found = generated(model, ids, mask, **cache_argument(model, cache), assistant_model=assistant)
        cache.check()
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert_logits_equal(torch.cat(found.logits), torch.cat(expected.logits))


@every_way
@every_layout
@every_decoder
def test_prompt_lookup(make: Any, layout: str, way: str) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    ids = random_ids(1, 5, seed=4).repeat(1, 3)  # a prompt that repeats itself, so that something is looked up
    mask = torch.ones_like(ids)
    expected = generated(plain, ids, mask, use_cache=False)
    assert_choices_are_clear(expected)
    cache = small_cache(model, layout)
    # transformers 5.0 looks a prompt up only where there is an end token; this one no tiny model can write.
    options = {"prompt_lookup_num_tokens": 3, "eos_token_id": VOCABULARY}
    found = generated(model, ids, mask, **cache_argument(model, cache), **options)
    cache.check()
    assert found.sequences.tolist() == expected.sequences.tolist()


@every_way
@every_layout
@every_decoder
def test_a_conversation_goes_on_over_one_cache(make: Any, layout: str, way: str) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    cache = small_cache(model, layout)
    text, mask = prompts((0, 2), seed=5)
    for turn in range(3):
        found = generated(model, text, mask, **cache_argument(model, cache))
        cache.check()
        assert_same_run(found, generated(plain, text, mask, use_cache=False))
        text = torch.cat([found.sequences, random_ids(2, 4, seed=50 + turn)], 1)
        mask = torch.cat([mask, torch.ones(2, text.shape[1] - mask.shape[1], dtype=torch.long)], 1)
    assert cache.seen_tokens > 2 * N_NEW


@every_way
@every_decoder
@pytest.mark.parametrize("how", ["fork", "truncate", "rollback"])
def test_several_questions_over_one_context(make: Any, way: str, how: str) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    context = random_ids(1, 10, seed=6)
    cache = small_cache(model)
    if how == "truncate":
        cache.activate_past_recording()  # so that a window keeps what the way back needs
    fed_logits(model, cache, context)
    mark = cache.checkpoint()
    for n in range(3):
        text = torch.cat([context, random_ids(1, 4, seed=60 + n)], 1)
        mask = torch.ones_like(text)
        used = cache.fork() if how == "fork" else cache
        found = generated(model, text, mask, **cache_argument(model, used))
        used.check()
        assert_same_run(found, generated(plain, text, mask, use_cache=False))
        if how == "truncate":
            cache.truncate(10)
        elif how == "rollback":
            cache.rollback(mark)
        assert cache.seen_tokens == 10


@every_way
@every_layout
@every_decoder
def test_reordered_selected_and_repeated_sequences(make: Any, layout: str, way: str) -> None:
    model, plain = model_for(way, make), model_for("gathered", make)
    ids = random_ids(3, 7, seed=8)
    cache = small_cache(model, layout)
    fed_logits(model, cache, ids)
    steps: list[tuple[str, Any, list[int]]] = [
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
        ("batch_select_indices", torch.tensor([5, 1, 2]), [5, 1, 2]),
        ("batch_select_indices", torch.tensor([True, False, True]), [0, 2]),
        ("reorder_cache", torch.tensor([1, 0]), [1, 0]),
    ]
    for verb, argument, sources in steps:
        getattr(cache, verb)(argument)
        cache.check()
        ids = ids[sources]
        assert cache.batch_size == len(ids)
        new = random_ids(len(ids), 3, seed=ids.shape[1])
        ids = torch.cat([ids, new], 1)
        assert_logits_equal(fed_logits(model, cache, new, [1, 2]), uncached_logits(plain, ids)[:, -3:])


# Encoder-decoders


@every_layout
@pytest.mark.parametrize("make", ENCODER_DECODERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
    ],
)
def test_encoder_decoders(make: Any, layout: str, options: dict[str, Any]) -> None:
    model = model_for("gathered", make)
    ids = random_ids(2, 8, seed=9)
    ids[0, 6:] = PAD_ID
    mask = (ids != PAD_ID).long()
    cache = small_cache(model, layout)
    found = generated(model, ids, mask, **cache_argument(model, cache), **options)
    cache.check()
    assert_same_run(found, generated(model, ids, mask, use_cache=False, **options))


@pytest.mark.parametrize("make", ENCODER_DECODERS)
def test_assisted_encoder_decoders(make: Any) -> None:
    model = model_for("gathered", make)
    ids = random_ids(1, 8, seed=10)
    mask = torch.ones_like(ids)
    expected = generated(model, ids, mask, use_cache=False)
    assert_choices_are_clear(expected)
    cache = small_cache(model)
    found = generated(model, ids, mask, **cache_argument(model, cache), assistant_model=make(seed=1))
    cache.check()
    assert found.sequences.tolist() == expected.sequences.tolist()


def test_an_encoder_decoder_whose_attention_can_be_replaced_is_attached() -> None:
    # BART takes its attention function from the registry, as Llama does.
    model, plain = model_for("attached", tiny_bart), model_for("gathered", tiny_bart)
    ids = random_ids(2, 8, seed=11)
    mask = torch.ones_like(ids)
    cache = small_cache(model)
    assert cache.self_attention_cache.is_attached
    found = generated(model, ids, mask, **cache_argument(model, cache), num_beams=2)
    cache.check()
    assert_same_run(found, generated(plain, ids, mask, use_cache=False, num_beams=2))
