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
from stratakv.plan import KeepPlan
from stratakv.policies import Window
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
    for plan in (KeepPlan(((0, 2.5),), 8), KeepPlan(((0, 4),), 8.5)):  # type: ignore[arg-type]  # on purpose
        with pytest.raises(ConfigurationError, match="must be a whole number"):
            cache.compact(plan)
    assert cache.stored_tokens == 12
    cache.compact(KeepPlan(((KINDS["numpy"](0), KINDS["tensor"](4)), (8, 4)), KINDS["numpy"](12)))
    assert cache.stored_tokens == 8
    cache.save(tmp_path / "cache")
