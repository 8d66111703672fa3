"""Numbers as others hand them over, a device's too, and a default device that is not the model's.

transformers counts drafts on the model's device, and scripts choose a default device for all that they make.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stratakv as sk
from stratakv.errors import ConfigurationError
from stratakv.policies import Window
from stratakv.testing.running import assert_logits_equal, fed_logits, random_ids, uncached_logits
from stratakv.testing.tiny import tiny_gemma3, tiny_llama
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


@pytest.mark.parametrize("size", [KINDS["tensor"](6), KINDS["numpy"](6), [np.int64(6), np.int64(6)], np.array([6, 6])])
def test_sizes_of_windows_are_kept_as_plain_numbers(size: Any) -> None:
    assert Window.from_dict(Window(size, KINDS["numpy"](1)).to_dict()).to_dict() == Window(size, 1).to_dict()
    assert {type(each) for each in Window(size).sizes} == {int}


@pytest.mark.parametrize("wrong", [2.5, "3", None, torch.tensor(2.5), torch.tensor([1, 2])])
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
