"""Cases 28, 29, 30, 33 and 34 of the faults that other caches had: files are verified before anything changes."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stratakv.blocks import snapshot
from stratakv.errors import FingerprintError, FormatError, StateError
from stratakv.integrations.transformers import KVCache
from stratakv.testing.running import assert_logits_equal, fed_logits, random_ids, uncached_logits
from stratakv.testing.tiny import tiny_gemma3, tiny_llama
from stratakv.testing.ways import small_cache

LAYOUTS = ("paged", "contiguous", "growing")


def state_of(cache: Any) -> tuple[Any, ...]:
    rows = [(layer.keys, layer.values) for layer in cache.layers]
    cloned = [tensor.clone() for pair in rows for tensor in pair if tensor is not None]
    return (cache.seen_tokens, cache.stored_tokens, cache.token_ids, cache.nbytes, cloned)


def assert_same_state(cache: Any, before: tuple[Any, ...]) -> None:
    after = state_of(cache)
    assert after[:4] == before[:4]
    assert all(torch.equal(a, b) for a, b in zip(after[4], before[4], strict=True))
    cache.check()


def saved(model: Any, path: Path, ids: Tensor, layout: str = "paged") -> Path:
    cache = small_cache(model, layout, **({"capacity": 32} if layout == "contiguous" else {}))
    if ids.shape[1]:
        fed_logits(model, cache, ids)
    cache.save(path, ids if ids.shape[1] else None)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
def test_a_loaded_cache_goes_on_as_the_saved_one_would(make: Callable[[], Any], layout: str, tmp_path: Path) -> None:
    model, ids = make(), random_ids(2, 20, seed=1)
    loaded = KVCache.load(saved(model, tmp_path / "cache", ids[:, :13], layout), model)
    loaded.check()
    assert (loaded.seen_tokens, loaded.spec.layout) == (13, layout)
    assert_logits_equal(fed_logits(model, loaded, ids[:, 13:]), uncached_logits(model, ids)[:, 13:])


def test_every_flipped_byte_and_every_truncation_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model, ids = tiny_llama(), random_ids(1, 12, seed=2)
    whole = saved(model, tmp_path / "cache", ids).read_bytes()
    live = small_cache(model)
    fed_logits(model, live, random_ids(1, 7, seed=3))
    before = state_of(live)
    draw = random.Random(0)
    damaged = tmp_path / "damaged"
    places = {0, 8, 12, 20, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(150))}
    for place in sorted(places):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        damaged.write_bytes(flipped)
        with pytest.raises(FormatError):
            live.restore(damaged)
    for length in (0, 7, 19, 20, 100, len(whole) // 2, len(whole) - 33, len(whole) - 1):
        damaged.write_bytes(whole[:length])
        with pytest.raises(FormatError):
            live.restore(damaged)
    damaged.write_bytes(whole + b"\0")
    with pytest.raises(FormatError, match="bytes"):
        live.restore(damaged)
    assert_same_state(live, before)


def test_an_empty_cache_comes_back_empty_and_a_missing_file_changes_nothing(tmp_path: Path) -> None:
    model, ids = tiny_llama(), random_ids(1, 9, seed=4)
    loaded = KVCache.load(saved(model, tmp_path / "empty", ids[:, :0]), model)
    assert (loaded.seen_tokens, loaded.stored_tokens, loaded.batch_size) == (0, 0, -1)
    assert_logits_equal(fed_logits(model, loaded, ids), uncached_logits(model, ids))
    before = state_of(loaded)
    with pytest.raises(FileNotFoundError):
        loaded.restore(tmp_path / "nothing here")
    assert_same_state(loaded, before)


@pytest.mark.parametrize(("n_shared", "n_own"), [(7, 0), (5, 3), (12, 4), (0, 6), (12, 0)])
def test_a_prompt_uses_the_prefix_it_shares_and_recomputes_at_least_its_last_token(
    n_shared: int, n_own: int, tmp_path: Path
) -> None:
    model, ids = tiny_llama(), random_ids(1, 12, seed=5)
    cache = KVCache.load(saved(model, tmp_path / "cache", ids), model)
    own = (random_ids(1, n_own, seed=6) if n_own else ids[:, :0]).clone()
    if n_own and n_shared < 12 and int(own[0, 0]) == int(ids[0, n_shared]):
        own[0, 0] = int(own[0, 0]) % 50 + 1
    prompt = torch.cat([ids[:, :n_shared], own], dim=1)
    used = cache.match_prefix(prompt)
    assert used == min(n_shared, prompt.shape[1] - 1)
    assert_logits_equal(fed_logits(model, cache, prompt[:, used:]), uncached_logits(model, prompt)[:, used:])


def test_a_cache_that_does_not_know_its_tokens_matches_no_prompt() -> None:
    model = tiny_llama()
    cache = small_cache(model)
    fed_logits(model, cache, random_ids(1, 5))
    with pytest.raises(StateError, match="token ids"):
        cache.match_prefix([1, 2, 3])


def with_rope_base(model: Any) -> Any:
    other = copy.deepcopy(model)
    parameters = other.config.rope_parameters
    parameters["rope_theta"] = 1234.0
    return other


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda model: tiny_llama(seed=1), "weights"),
        (lambda model: copy.deepcopy(model).to(torch.bfloat16), "dtype"),
        (with_rope_base, "rope"),
        (lambda model: tiny_gemma3(), "architecture"),
    ],
)
def test_another_model_is_refused_with_what_differs(other: Any, named: str, tmp_path: Path) -> None:
    model = tiny_llama()
    path = saved(model, tmp_path / "cache", random_ids(1, 12))
    with pytest.raises(FingerprintError, match=named):
        KVCache.load(path, other(model))


def test_another_format_version_or_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    path = saved(model, tmp_path / "cache", random_ids(1, 12))
    live = small_cache(model, format="bf16")
    before = state_of(live)
    with pytest.raises(FingerprintError, match="bf16"):
        live.restore(path)
    assert_same_state(live, before)
    monkeypatch.setattr(snapshot, "VERSION", snapshot.VERSION + 1)
    with pytest.raises(FormatError, match="version"):
        KVCache.load(path, model)


class Trap:
    """Unpickling it would leave a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_a_pickle_is_refused_and_nothing_in_it_runs(tmp_path: Path) -> None:
    model = tiny_llama()
    path, marker = tmp_path / "cache", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Trap(marker)))
    with pytest.raises(FormatError, match="not a StrataKV cache file"):
        KVCache.load(path, model)
    assert not marker.exists()


def test_a_failed_save_leaves_the_old_file_and_no_trace(tmp_path: Path) -> None:
    model, ids = tiny_llama(), random_ids(1, 12)
    path = saved(model, tmp_path / "cache", ids)
    old = path.read_bytes()
    cache = KVCache.load(path, model)
    cache.batch.memory.arenas[0].dump = None  # type: ignore[method-assign,assignment]  # fails in the middle
    with pytest.raises(TypeError):
        cache.save(path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
