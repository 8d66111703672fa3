"""Numbers and indices as others hand them over, a device's too, and a default device that is not the model's.

transformers counts drafts on the model's device, and scripts choose a default device for all that they make.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stratakv as sk
from stratakv.errors import ConfigurationError, StateError
from stratakv.integrations.transformers.arguments import whole_numbers
from stratakv.plan import KeepPlan
from stratakv.policies import Window
from stratakv.spec import Retention
from stratakv.testing.running import assert_logits_equal, fed_logits, random_ids, uncached_logits
from stratakv.testing.tiny import tiny_gemma3, tiny_llama, tiny_t5
from stratakv.testing.ways import WAYS, model_for, small_cache

KINDS: dict[str, Any] = {"tensor": torch.tensor, "numpy": np.int64}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_any_kind_of_whole_number_is_taken_and_none_is_kept(way: str, kind: Any, tmp_path: Path) -> None:
    model, ids = model_for(way, tiny_llama), random_ids(2, 20)
    cache = small_cache(model, block_tokens=kind(4))
    fed_logits(model, cache, ids)
    cache.crop(kind(-3))
    cache.truncate(kind(15))
    cache.batch_repeat_interleave(kind(2))
    assert type(cache.seen_tokens) is int
    cache.save(tmp_path / "cache")
    again = ids[:, 15:].repeat_interleave(2, dim=0)
    expected = uncached_logits(model_for("gathered", tiny_llama), ids.repeat_interleave(2, dim=0))[:, 15:]
    assert_logits_equal(fed_logits(model, cache, again), expected)
    assert_logits_equal(fed_logits(model, sk.KVCache.load(tmp_path / "cache", model), again), expected)


@pytest.mark.parametrize("size", [KINDS["tensor"](6), KINDS["numpy"](6), [np.int64(6), np.int64(6)]])
def test_sizes_of_windows_are_kept_as_plain_numbers(size: Any) -> None:
    assert Window.from_dict(Window(size, KINDS["numpy"](1)).to_dict()).to_dict() == Window(size, 1).to_dict()
    assert {type(each) for each in Window(size).sizes} == {int}


@pytest.mark.parametrize("size", [True, "6", b"6", {6: 6}, [6.5], torch.tensor([6, 6])])
def test_what_is_no_size_of_a_window_is_refused(size: Any) -> None:
    with pytest.raises(ConfigurationError, match="the size of a window must be a whole number"):
        Window(size)


@pytest.mark.parametrize("wrong", [2.5, "3", None, True, torch.tensor(True), torch.tensor(2.5), torch.tensor([1, 2])])
@pytest.mark.parametrize("verb", ["crop", "truncate", "batch_repeat_interleave"])
def test_what_is_no_whole_number_is_refused_and_changes_nothing(verb: str, wrong: Any) -> None:
    model, ids = model_for("gathered", tiny_llama), random_ids(1, 9)
    cache = small_cache(model)
    fed_logits(model, cache, ids[:, :6])
    with pytest.raises(ConfigurationError, match="must be a whole number"):
        getattr(cache, verb)(wrong)
    assert_logits_equal(fed_logits(model, cache, ids[:, 6:]), uncached_logits(model, ids)[:, 6:])


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
@pytest.mark.parametrize("way", WAYS)
def test_the_default_device_may_be_another_than_the_models(way: str, make: Any, tmp_path: Path) -> None:
    model, ids = make(), random_ids(2, 24)
    expected = uncached_logits(model, ids)
    with torch.device("meta"):  # whatever is made there by mistake cannot be computed with
        if way == "attached":
            sk.attach(model)
        cache = small_cache(model)
        logits = [fed_logits(model, cache, ids[:, :20], chunks=[7, 1, 12])]
        cache.crop(-4)
        cache.save(tmp_path / "cache", token_ids=ids[:, :16])
        cache = sk.KVCache.load(tmp_path / "cache", model)
        cache.reorder_cache(torch.tensor([1, 0], device=ids.device))
        cache = cache.fork()
        logits.append(fed_logits(model, cache, ids[:, 16:].flip(0)).flip(0))
        report = sk.verify(model, ids)
    assert_logits_equal(torch.cat([logits[0][:, :16], logits[1]], dim=1), expected)
    assert report.passed


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("make", [tiny_llama, tiny_t5])
def test_indices_of_any_whole_dtype_choose_what_they_name(make: Any, dtype: torch.dtype) -> None:
    model, ids, n = model_for("gathered", make), random_ids(300, 4), [5, 100, 7]
    inputs: dict[str, Any] = {"input_ids": random_ids(300, 5, seed=1)} if make is tiny_t5 else {}
    expected = uncached_logits(model, ids, **inputs)
    cache = small_cache(model)
    fed_logits(model, cache, ids[:, :3], **inputs)
    cache.batch_select_indices(torch.tensor(n).to(dtype))  # modulo 300, a number of 8 bits would wrap
    chosen = {name: value[n] for name, value in inputs.items()}
    assert_logits_equal(fed_logits(model, cache, ids[n, 3:], **chosen), expected[n, 3:])


WRONG_INDICES = {
    "floats": [0.0, 1.0, 2.0],
    "none": None,
    "complex": torch.zeros(2, dtype=torch.complex64),
    "a table": torch.zeros(2, 2, dtype=torch.long),
    "one truth": True,
    "a mask of fewer": torch.tensor([True, False]),
    "a mask of more": torch.ones(4, dtype=torch.bool),
    "beyond": torch.tensor([3]),
}


@pytest.mark.parametrize("wrong", WRONG_INDICES.values(), ids=WRONG_INDICES)
@pytest.mark.parametrize("make", [tiny_llama, tiny_t5])
def test_what_are_no_indices_is_refused_and_changes_nothing(make: Any, wrong: Any) -> None:
    model, ids = model_for("gathered", make), random_ids(3, 9)
    inputs: dict[str, Any] = {"input_ids": random_ids(3, 5, seed=1)} if make is tiny_t5 else {}
    cache = small_cache(model)
    fed_logits(model, cache, ids[:, :6], **inputs)
    with pytest.raises(ConfigurationError):
        cache.batch_select_indices(wrong)
    assert_logits_equal(fed_logits(model, cache, ids[:, 6:], **inputs), uncached_logits(model, ids, **inputs)[:, 6:])


def test_repeating_a_forward_that_stopped_changes_neither_half() -> None:
    model, ids, source = tiny_t5(), random_ids(2, 6), random_ids(2, 5, seed=1)

    def stop(*_: Any) -> None:
        raise RuntimeError("stopped")

    cache = small_cache(model)
    handle = model.get_decoder().block[-1].layer[1].register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stopped"):
        fed_logits(model, cache, ids, input_ids=source)
    handle.remove()
    with pytest.raises(StateError):
        cache.batch_repeat_interleave(2)
    assert {len(half.batch.sequences) for half in (cache.self_attention_cache, cache.cross_attention_cache)} == {2}


WRONG_NUMBERS = {
    "a truth": [True, 2],
    "a truth in rows": [[1, 2], [np.True_, 2]],
    "beyond int64": torch.tensor([2**64 - 1], dtype=torch.uint64),
    "an array beyond int64": np.array([2**64 - 1], dtype=np.uint64),
    "sparse": torch.tensor([0, 1]).to_sparse(),
    "bytes": bytearray(b"ab"),
}


@pytest.mark.parametrize("kind", WRONG_NUMBERS)
def test_numbers_that_are_almost_whole_are_refused(kind: str) -> None:
    with pytest.raises(ConfigurationError, match="indices must be whole numbers"):
        whole_numbers("indices", WRONG_NUMBERS[kind])


@pytest.mark.parametrize("given", [[1, 2], np.array([1, 2], np.uint64), torch.tensor([1, 2], dtype=torch.uint16)])
def test_whole_numbers_of_any_kind_are_taken(given: Any) -> None:
    assert whole_numbers("indices", given).tolist() == [1, 2]


class Numpys(Window):
    """Says the same as a window in numpy's numbers."""

    def retention(self, layer: int, head: int) -> Retention:
        found = super().retention(layer, head)
        return Retention(np.int64(found.window), np.int64(found.sinks))  # type: ignore[arg-type]  # as callers do

    def keep(self, *given: Any) -> KeepPlan | None:
        plan = super().keep(*given)
        return plan and KeepPlan(tuple((np.int64(a), np.int64(n)) for a, n in plan.runs), np.int64(plan.floor))  # type: ignore[misc, arg-type]  # as callers do


def test_a_policy_may_count_in_numpys_numbers(tmp_path: Path) -> None:
    model = model_for("attached", tiny_llama)
    caches = [small_cache(model, policy=kind(8, sinks=4), block_tokens=4) for kind in (Window, Numpys)]
    expected, found = (fed_logits(model, cache, random_ids(1, 40), [10] * 4) for cache in caches)
    assert torch.equal(found, expected)
    caches[1].save(tmp_path / "cache")
    assert sk.KVCache.load(tmp_path / "cache", model).stored_tokens == caches[0].stored_tokens < 40


@pytest.mark.parametrize("wrong", [(2.5, 0), (True, 0), (0, 0), (4, -1), (4, "1")])
def test_what_is_no_window_is_refused(wrong: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigurationError):
        Retention(*wrong)
    with pytest.raises(ConfigurationError):
        KeepPlan(((0, 2, 3),), 6)  # type: ignore[arg-type]  # it is to be refused


def test_no_prompt_is_refused_and_the_cache_stays(tmp_path: Path) -> None:
    model, ids = model_for("gathered", tiny_llama), random_ids(1, 9)
    cache = small_cache(model)
    fed_logits(model, cache, ids)
    cache.save(tmp_path / "cache", token_ids=ids)
    cache = sk.KVCache.load(tmp_path / "cache", model)
    prompts: tuple[Any, ...] = (5, [], [[]], torch.zeros(0, dtype=torch.long), [[[1]]])
    for prompt in prompts:
        with pytest.raises(ConfigurationError, match="one prompt"):
            cache.match_prefix(prompt)
        assert cache.seen_tokens == 9


@pytest.mark.parametrize("mask", [[True], np.array([True, False]), torch.tensor([True, False, True, True])])
def test_a_mask_of_sequences_has_one_truth_value_for_each(mask: Any) -> None:
    model = model_for("gathered", tiny_llama)
    cache = small_cache(model)
    fed_logits(model, cache, random_ids(3, 5))
    with pytest.raises(ConfigurationError, match=r"a mask of 3|whole numbers"):
        cache.batch_select_indices(mask)
    cache.batch_select_indices(np.array([True, False, True]))
    assert len(cache.batch.sequences) == 2


@pytest.mark.parametrize("wrong", [0.5, True, "ids"])
def test_what_are_no_token_ids_is_refused_and_changes_nothing(wrong: Any, tmp_path: Path) -> None:
    model, ids = model_for("gathered", tiny_llama), random_ids(1, 9)
    cache = small_cache(model)
    fed_logits(model, cache, ids)
    bad = {0.5: ids + 0.5, True: ids.bool()}.get(wrong, wrong)
    with pytest.raises(ConfigurationError, match="token_ids must be whole numbers"):
        cache.save(tmp_path / "cache", token_ids=bad)
    assert not list(tmp_path.iterdir())
    cache.save(tmp_path / "cache", token_ids=ids)
    cache = sk.KVCache.load(tmp_path / "cache", model)
    for prompt in (bad, ids.repeat(2, 1)):
        with pytest.raises(ConfigurationError, match="token_ids must be"):
            cache.match_prefix(prompt)
    assert cache.match_prefix(ids[0]) == 8
    with pytest.raises(ConfigurationError, match="token_ids must be whole numbers"):
        sk.verify(model, bad)


@pytest.mark.parametrize("sizes", [(1, -3), (1, 0), (0, 5), (1, 2.5), (True, 2)])
def test_a_step_of_nothing_is_refused(sizes: tuple[Any, Any]) -> None:
    cache = small_cache(model_for("gathered", tiny_llama))
    with pytest.raises(ConfigurationError):
        cache.batch.begin(*sizes)
    assert cache.batch.open_step is None
    cache.check()


def test_positions_to_keep_are_whole_and_are_kept_as_plain_numbers(tmp_path: Path) -> None:
    model, ids = model_for("attached", tiny_llama), random_ids(1, 12)
    cache = small_cache(model)
    fed_logits(model, cache, ids)
    for runs, floor in ((((0, 2.5),), 8), (((0, 4),), 8.5)):
        with pytest.raises(ConfigurationError, match="must be a whole number"):
            KeepPlan(runs, floor)  # type: ignore[arg-type]  # on purpose
    cache.compact(KeepPlan(((KINDS["numpy"](0), KINDS["tensor"](4)), (8, 4)), KINDS["numpy"](12)))
    assert cache.stored_tokens == 8
    cache.save(tmp_path / "cache")
