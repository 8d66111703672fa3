"""`attach(model, native=True)`: the native runner takes forwards that it can, and gives what the model would."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import gc
import inspect
import io
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stratakv import KVCache, attach, fidelity
from stratakv.errors import CapacityError, StateError, UnsupportedError
from stratakv.extension import is_built
from stratakv.integrations.transformers.compat import cache_keyword
from stratakv.models.native import NativeRunner
from stratakv.policies import Window
from stratakv.testing.running import assert_logits_equal, cache_argument, fed_logits, random_ids, uncached_logits
from stratakv.testing.tiny import (
    VOCABULARY,
    tiny_bart,
    tiny_gemma2,
    tiny_gemma3,
    tiny_llama,
    tiny_mistral,
    tiny_qwen2,
    tiny_qwen3,
)
from stratakv.testing.ways import LAYOUTS, small_cache

pytestmark = pytest.mark.skipif(not is_built(), reason="installed without the extension, on purpose or for want of g++")

MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "mistral": partial(tiny_mistral, window=9),
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "gemma2": tiny_gemma2,
    "gemma3": tiny_gemma3,
}
CHUNKS = [12, 1, 1, 1, 9]


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The tokens of each forward that a runner took since the last `native.clear()`."""
    taken: list[int] = []
    own = NativeRunner.forward

    def forward(self: NativeRunner, batch: Any, tokens: Tensor, **options: Any) -> Tensor:
        found = own(self, batch, tokens, **options)
        taken.append(tokens.shape[1])
        return found

    monkeypatch.setattr(NativeRunner, "forward", forward)
    yield taken


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_without_a_cache(name: str, native: list[int]) -> None:
    model, ids = MODELS[name](), random_ids(2, 24)
    expected = uncached_logits(model, ids)
    attachment = attach(model, native=True)
    native.clear()
    assert attachment.is_native
    assert_logits_equal(fed_logits(model, KVCache.for_model(model), ids, CHUNKS), expected)
    assert native == CHUNKS
    assert torch.equal(uncached_logits(model, ids), expected)
    attachment.detach()
    assert "forward" not in vars(model)
    assert_logits_equal(fed_logits(model, KVCache.for_model(model), ids, CHUNKS), expected)
    assert native == CHUNKS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, native: list[int]) -> None:
    model, ids = tiny_llama(), random_ids(2, 24)
    attach(model, native=True)
    native.clear()
    expected = uncached_logits(model, ids)
    assert_logits_equal(fed_logits(model, small_cache(model, layout), ids, CHUNKS), expected)
    assert native == CHUNKS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_come_in_the_dtype_of_the_model(dtype: torch.dtype, native: list[int]) -> None:
    model, ids = tiny_llama().to(dtype), random_ids(1, 24)
    attach(model)
    expected = fed_logits(model, KVCache.for_model(model), ids, CHUNKS)
    attach(model, native=True)
    native.clear()
    found = fed_logits(model, KVCache.for_model(model), ids, CHUNKS)
    assert native == CHUNKS
    assert found.dtype == dtype
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, atol=16 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_formats_of_few_bits(format: str, native: list[int]) -> None:
    model, ids, chunks = tiny_llama(), random_ids(1, 150), [100, *[1] * 50]
    attach(model)
    expected = fed_logits(model, KVCache.for_model(model, format=format), ids, chunks)
    attach(model, native=True)
    native.clear()
    found = fed_logits(model, KVCache.for_model(model, format=format), ids, chunks)
    assert native == chunks
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-3)


GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 8},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("name", GENERATE)
@pytest.mark.parametrize("model_name", ["llama", "gemma3"])
def test_generate_gives_the_same_tokens(name: str, model_name: str, native: list[int]) -> None:
    model, ids = MODELS[model_name](), random_ids(1, 10)
    found = []
    for is_native in (False, True):
        attach(model, native=is_native)
        native.clear()
        torch.manual_seed(0)
        found.append(
            model.generate(ids, **cache_argument(model, KVCache.for_model(model)), max_new_tokens=12, **GENERATE[name])
        )
        assert bool(native) == is_native
    assert torch.equal(*found)


@pytest.mark.parametrize("is_native", [False, True])
def test_a_prompt_in_parts_takes_no_16_bits_a_number(is_native: bool) -> None:
    model, ids = tiny_llama(), random_ids(1, 2048)
    attach(model, native=is_native)
    peaks = []
    held: list[int]
    for size in (None, 128):
        cache, held = KVCache.for_model(model, format="int4"), []
        own = cache.batch.begin

        def noted(*sizes: int, own: Any = own, held: list[int] = held, cache: Any = cache) -> None:
            own(*sizes)
            held.append(cache.nbytes)

        cache.batch.begin = noted
        model.generate(ids, **cache_argument(model, cache), max_new_tokens=3, prefill_chunk_size=size)
        peaks.append(max(held))
    exact = KVCache.for_model(model, format="bf16")
    fed_logits(model, exact, ids)
    assert peaks[1] < 0.6 * exact.nbytes < exact.nbytes < peaks[0]


def test_the_cache_goes_back_and_forks_and_is_saved_as_after_any_forward(tmp_path: Path, native: list[int]) -> None:
    model, ids, other = tiny_llama(), random_ids(2, 24), random_ids(2, 6, seed=1)
    attach(model, native=True)
    cache = small_cache(model)
    fed_logits(model, cache, ids, CHUNKS)
    mark, fork = cache.checkpoint(), cache.fork()
    cache.save(tmp_path / "cache")
    expected = uncached_logits(model, torch.cat([ids, other], 1))[:, 24:]
    for each in (cache, fork, KVCache.load(tmp_path / "cache", model)):
        native.clear()
        assert_logits_equal(fed_logits(model, each, other, [5, 1]), expected)
        assert native == [5, 1]
    cache.rollback(mark)
    assert_logits_equal(fed_logits(model, cache, other), expected)
    cache.truncate(8)
    again = torch.cat([ids[:, :8], other], 1)
    assert_logits_equal(fed_logits(model, cache, other), uncached_logits(model, again)[:, 8:])
    cache.reorder_cache(torch.tensor([1, 0]))
    assert_logits_equal(
        fed_logits(model, cache, ids[:, :3]), uncached_logits(model, torch.cat([again.flip(0), ids[:, :3]], 1))[:, 14:]
    )


def test_a_policy(native: list[int]) -> None:
    model, ids = tiny_llama(), random_ids(1, 40)
    attach(model)
    expected = fed_logits(model, KVCache.for_model(model, policy=Window(8, sinks=2)), ids, [20, *[1] * 20])
    attach(model, native=True)
    native.clear()
    found = fed_logits(model, KVCache.for_model(model, policy=Window(8, sinks=2)), ids, [20, *[1] * 20])
    assert_logits_equal(found, expected)
    assert len(native) == 21


def test_no_room_leaves_the_cache_as_it_was(native: list[int]) -> None:
    model, ids = tiny_llama(), random_ids(1, 24)
    attach(model, native=True)
    native.clear()
    cache = small_cache(model, "contiguous", capacity=20)
    fed_logits(model, cache, ids[:, :18])
    with pytest.raises(CapacityError):
        fed_logits(model, cache, ids[:, 18:])
    assert cache.seen_tokens == 18
    assert_logits_equal(fed_logits(model, cache, ids[:, 18:20]), uncached_logits(model, ids[:, :20])[:, 18:])
    assert native == [18, 2]


def keyword(model: Any, cache: Any) -> dict[str, Any]:
    return {cache_keyword(model): cache, "use_cache": True}


OTHERS: dict[str, Callable[[Any, Tensor], dict[str, Any]]] = {
    "embeddings": lambda model, ids: {"inputs_embeds": model.get_input_embeddings()(ids)},
    "hidden states": lambda model, ids: {"input_ids": ids, "output_hidden_states": True},
    "labels": lambda model, ids: {"input_ids": ids, "labels": ids},
    "padding": lambda model, ids: {
        "input_ids": ids,
        "attention_mask": torch.ones(2, 12).index_fill_(1, torch.tensor([0]), 0),
    },
    "a mask of four axes": lambda model, ids: {"input_ids": ids, "attention_mask": torch.zeros(2, 1, 12, 12)},
    "other positions": lambda model, ids: {"input_ids": ids, "position_ids": torch.arange(3, 15)[None]},
    "chosen logits": lambda model, ids: {"input_ids": ids, "logits_to_keep": torch.tensor([1, 4])},
    "a tuple": lambda model, ids: {"input_ids": ids, "return_dict": False},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_runner_does_not_compute_is_the_models_own(name: str, native: list[int]) -> None:
    model, ids = tiny_llama(), random_ids(2, 12)
    inputs = OTHERS[name](model, ids)
    found = []
    for is_native in (False, True):
        attach(model, native=is_native)
        native.clear()
        with torch.no_grad():
            output = model(**inputs, **keyword(model, KVCache.for_model(model)))
        found.append(output)
        assert not native
    logits = [output[0] if isinstance(output, tuple) else output.logits for output in found]
    assert torch.equal(*logits)
    assert found[0].keys() == found[1].keys() if hasattr(found[0], "keys") else len(found[0]) == len(found[1])


@pytest.mark.parametrize("kept", [0, 1, 5, 40])
@pytest.mark.parametrize("is_positional", [False, True])
def test_plain_calls_are_the_runners(kept: int, is_positional: bool, native: list[int]) -> None:
    model, ids = tiny_llama(), random_ids(2, 12)
    expected = uncached_logits(model, ids)[:, -kept:]
    attach(model, native=True)
    native.clear()
    cache = KVCache.for_model(model)
    inputs: dict[str, Any] = {"attention_mask": torch.ones(2, 12, dtype=torch.int64), "logits_to_keep": kept}
    with torch.no_grad():
        if is_positional:
            output = model(ids, inputs["attention_mask"], torch.arange(12)[None], cache, logits_to_keep=kept)
        else:
            output = model(input_ids=ids, **inputs, **keyword(model, cache))
    assert native == [12]
    assert_logits_equal(output.logits, expected)
    assert output[cache_keyword(model)] is cache
    assert output.logits.is_inference() is False


def test_gradients_autocast_and_training_are_the_models_own(native: list[int]) -> None:
    model, ids = tiny_llama(), random_ids(1, 12)
    attach(model, native=True)
    native.clear()
    logits = model.requires_grad_(True)(input_ids=ids, **keyword(model, KVCache.for_model(model))).logits
    with pytest.raises(UnsupportedError, match="gradient"):  # rather than a gradient that is not there
        logits.sum().backward()
    inputs = keyword(model, KVCache.for_model(model, format="bf16"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids=ids, **inputs).logits.dtype == torch.bfloat16
    model.train()
    fed_logits(model, KVCache.for_model(model), ids)
    assert not native
    model.eval()
    fed_logits(model, KVCache.for_model(model), ids)
    assert native == [12]


def test_both_ways_take_turns_over_one_cache(native: list[int]) -> None:
    model, ids = tiny_mistral(window=9), random_ids(2, 40)
    expected = uncached_logits(model, ids)
    attach(model, native=True)
    native.clear()
    cache, at, pieces = small_cache(model), 0, []
    for i, n in enumerate([7, 1, 1, 13, 1, 5, 1, 11]):
        more: dict[str, Any] = {"output_hidden_states": True} if i % 2 else {}
        pieces.append(fed_logits(model, cache, ids[:, at : at + n], **more))
        at += n
    assert_logits_equal(torch.cat(pieces, 1), expected)
    assert native == [7, 1, 1, 1]


def layer_of(model: Any) -> Any:
    return model.model.layers[1]


def lowered(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.half().float()


def by_data(model: Any, patch: pytest.MonkeyPatch) -> None:
    layer_of(model).mlp.down_proj.weight.data *= 1.5


def in_place(model: Any, patch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        model.model.norm.weight[3] = 2.0


def another_head(model: Any, patch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        model.lm_head = torch.nn.Linear(model.lm_head.in_features, VOCABULARY, bias=False)


def loaded(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.load_state_dict(tiny_llama(seed=5).state_dict())


def assigned(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.load_state_dict(tiny_llama(seed=5).state_dict(), assign=True)


def scaled(model: Any, patch: pytest.MonkeyPatch) -> None:
    layer_of(model).self_attn.scaling *= 2


def normed(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.model.norm.variance_epsilon = 1.0


def rotated(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.model.rotary_emb.attention_scaling = 2.0


def of_another_class(model: Any, patch: pytest.MonkeyPatch) -> None:
    kind = type(layer_of(model).mlp)

    class Doubled(kind):  # type: ignore[misc, valid-type]  # transformers is untyped
        def forward(self, x: Tensor) -> Any:
            return 2 * super().forward(x)

    layer_of(model).mlp.__class__ = Doubled


def linear_of_another_class(model: Any, patch: pytest.MonkeyPatch) -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer_of(model).mlp.up_proj.__class__ = Doubled


def linear_patched(model: Any, patch: pytest.MonkeyPatch) -> None:
    own = torch.nn.Linear.forward
    patch.setattr(torch.nn.Linear, "forward", lambda self, x: 2 * own(self, x))


def class_patched(model: Any, patch: pytest.MonkeyPatch) -> None:
    kind = type(layer_of(model).mlp)
    own = kind.forward
    patch.setattr(kind, "forward", lambda self, x: 2 * own(self, x))


def function_patched(model: Any, patch: pytest.MonkeyPatch) -> None:
    file = sys.modules[type(model).__module__]
    patch.setattr(file, "apply_rotary_pos_emb", lambda q, k, *_, **__: (2 * q, k))


def hooked(model: Any, patch: pytest.MonkeyPatch) -> None:
    layer_of(model).register_forward_hook(lambda module, inputs, output: output * 1.25)


def patched(model: Any, patch: pytest.MonkeyPatch) -> None:
    mlp = layer_of(model).mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x) * 2


def called_otherwise(model: Any, patch: pytest.MonkeyPatch) -> None:
    mlp = layer_of(model).mlp
    mlp._call_impl = lambda x: type(mlp).forward(mlp, x) * 2


def with_parameters_elsewhere(model: Any, patch: pytest.MonkeyPatch) -> None:
    linear = layer_of(model).mlp.down_proj
    linear._parameters = {"weight": torch.nn.Parameter(linear.weight.detach() * 2), "bias": None}


def with_modules_elsewhere(model: Any, patch: pytest.MonkeyPatch) -> None:
    other = tiny_llama(seed=5)
    attach(other)
    model.model.layers._modules = other.model.layers._modules


def with_another_ones_dictionary(model: Any, patch: pytest.MonkeyPatch) -> None:
    other = tiny_llama(seed=5)
    attach(other)
    layer_of(model).__dict__ = dict(vars(layer_of(other)))


def clipped(model: Any, patch: pytest.MonkeyPatch) -> None:
    model.model.embed_tokens.max_norm = 0.1


def model_of_another_class(model: Any, patch: pytest.MonkeyPatch) -> None:
    kind = type(model)

    class Doubled(kind):  # type: ignore[misc, valid-type]  # transformers is untyped
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = kind.forward(self, *args, **kwargs)
            output.logits = output.logits * 2
            return output

    Doubled.forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]  # inspect looks there
    model.__class__ = Doubled


def call_patched(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(type(layer_of(model).mlp), "__call__", lambda self, x: 2 * self.forward(x))


def attention_replaced(model: Any, patch: pytest.MonkeyPatch) -> None:
    own = ALL_ATTENTION_FUNCTIONS["stratakv"]

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output, weights = own(*args, **kwargs)
        return 2 * output, weights

    patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "stratakv", doubled)


def patched_again(model: Any, patch: pytest.MonkeyPatch) -> None:
    mlp, ids = layer_of(model).mlp, random_ids(1, 4)
    own = mlp.forward
    for factor in (2, 3):
        mlp.forward = own  # which stays in the instance
        with torch.no_grad():
            model(ids, **cache_argument(model, KVCache.for_model(model)))
        mlp.forward = lambda x, factor=factor: factor * own(x)


def hooked_elsewhere(model: Any, patch: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        module._forward_hooks = collections.OrderedDict()
    layer_of(model).mlp.register_forward_hook(lambda module, inputs, output: output * 2)


def hooked_in_the_place_of_a_recorder(model: Any, patch: pytest.MonkeyPatch) -> None:
    mlp, cache = layer_of(model).mlp, KVCache.for_model(model)
    with torch.no_grad():
        model(random_ids(1, 4), output_hidden_states=True, **cache_argument(model, cache))
        model(random_ids(1, 4), **cache_argument(model, cache))
    n_hooks = sum(len(module._forward_hooks) for module in model.modules())
    for module in model.modules():
        module._forward_hooks.clear()
    for _ in range(max(n_hooks, 1)):
        mlp.register_forward_hook(lambda module, inputs, output: output * 2)


WEIGHTS = (
    *(lowered, by_data, in_place, another_head, loaded, assigned, with_parameters_elsewhere, with_modules_elsewhere),
    with_another_ones_dictionary,
)
CODE = (
    *(scaled, normed, rotated, clipped, of_another_class, linear_of_another_class, model_of_another_class),
    *(class_patched, linear_patched, function_patched, call_patched, attention_replaced),
)
HOOKS = (hooked, patched, called_otherwise, patched_again, hooked_elsewhere, hooked_in_the_place_of_a_recorder)


@pytest.mark.parametrize("change", [*WEIGHTS, *CODE, *HOOKS])
def test_a_changed_model_runs_in_torch_and_says_so(
    change: Callable[..., None], native: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_llama(), random_ids(1, 24)
    attachment = attach(model, native=True)
    cache = KVCache.for_model(model)
    before = fed_logits(model, cache, ids)
    change(model, monkeypatch)
    native.clear()
    cache.reset()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = fed_logits(model, cache, ids, [12, 12])
    assert not native
    messages = [str(each.message) for each in seen]
    assert len(messages) == (change not in HOOKS)
    assert all("have the change taken on" in message for message in messages)
    assert attachment.native_reason
    expected = uncached_logits(model, ids)
    assert not torch.equal(expected, before)
    assert_logits_equal(found, expected)
    if change in WEIGHTS and change is not another_head:  # others the runner refuses, as they are no plain models
        attach(model, native=True)
        assert_logits_equal(fed_logits(model, KVCache.for_model(model), ids), expected)
        assert native[-1] == 24


@pytest.mark.parametrize("of_class", [True, False])
def test_methods_that_a_forward_calls(of_class: bool, native: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_gemma3(), random_ids(1, 12)
    attachment = attach(model, native=True)
    before = fed_logits(model, KVCache.for_model(model), ids)
    norm = model.model.norm
    own = type(norm)._norm
    monkeypatch.setattr(type(norm) if of_class else norm, "_norm", lambda *args: 1.5 * own(norm, args[-1]))
    native.clear()
    with pytest.warns(RuntimeWarning, match="code") if of_class else contextlib.nullcontext():
        found = fed_logits(model, KVCache.for_model(model), ids)
    assert not native
    assert attachment.native_reason
    expected = uncached_logits(model, ids)
    assert not torch.equal(expected, before)
    assert_logits_equal(found, expected)


class _Doubling(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        return found * 2 if function is torch.nn.functional.silu else found


def test_modes_of_torch_see_what_the_model_computes(native: list[int]) -> None:
    model, ids = tiny_llama(), random_ids(1, 12)
    attach(model, native=True)
    native.clear()
    with _Doubling():
        assert_logits_equal(fed_logits(model, KVCache.for_model(model), ids), uncached_logits(model, ids))
    assert not native
    with torch.device("cpu"):
        fed_logits(model, KVCache.for_model(model), ids)
    assert native == [12]


def test_a_weight_that_lies_turned_is_looked_at(native: list[int]) -> None:
    model, ids = tiny_llama(), random_ids(1, 12)
    linear = layer_of(model).mlp.down_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach().t().contiguous().t(), requires_grad=False)
    attach(model, native=True)
    native.clear()
    linear.weight.data *= 1.5
    with pytest.warns(RuntimeWarning, match="weights"):
        found = fed_logits(model, KVCache.for_model(model), ids)
    assert_logits_equal(found, uncached_logits(model, ids))
    assert not native


def test_a_cache_whose_update_was_replaced(native: list[int]) -> None:
    model, ids = tiny_llama(), random_ids(1, 12)
    attach(model, native=True)
    native.clear()
    cache, seen = KVCache.for_model(model), []
    own = cache.update

    def update(keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        seen.append(layer)
        return own(keys, values, layer, *args, **kwargs)

    cache.update = update
    fed_logits(model, cache, ids)
    assert seen == [0, 1]
    assert not native


def test_attached_in_training_mode(native: list[int]) -> None:
    model, ids = tiny_llama().train(), random_ids(1, 12)
    attachment = attach(model, native=True)
    model.eval()
    native.clear()
    assert_logits_equal(fed_logits(model, KVCache.for_model(model), ids), uncached_logits(model, ids))
    assert native == [12]
    model.model.layers.train()
    with pytest.warns(RuntimeWarning, match="attribute"):
        fed_logits(model, KVCache.for_model(model), ids)
    assert native == [12]
    assert "attribute" in str(attachment.native_reason)


def with_unseen_changes() -> Any:
    with torch.inference_mode():
        return tiny_llama()


def with_a_tensor_in_its_config() -> Any:
    model = tiny_llama()
    model.config.statistics = torch.zeros(3)
    return model


@pytest.mark.parametrize("made", [with_unseen_changes, with_a_tensor_in_its_config])
def test_a_model_whose_changes_would_not_be_seen_is_refused(made: Callable[[], Any]) -> None:
    model, ids = made(), random_ids(1, 12)
    with pytest.raises(UnsupportedError, match=r"inference_mode|config"):
        attach(model, native=True)
    assert "forward" not in vars(model)
    attach(model)
    assert_logits_equal(fed_logits(model, KVCache.for_model(model), ids), uncached_logits(model, ids))


def test_a_tensor_that_comes_into_the_config(native: list[int]) -> None:
    model, ids = tiny_llama(), random_ids(1, 12)
    model.config.of_mine = 1.0
    attach(model, native=True)
    native.clear()
    model.config.of_mine = torch.zeros(3)
    with pytest.warns(RuntimeWarning, match="config"):
        fed_logits(model, KVCache.for_model(model), ids)
    assert not native


def test_another_thread_may_let_the_copy_go(native: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_llama(), random_ids(1, 12)
    attach(model, native=True)
    own = NativeRunner.refuses

    def refuses(self: NativeRunner, batch: Any) -> str | None:
        model.forward._copied = None
        model.forward.reason = None
        return own(self, batch)

    monkeypatch.setattr(NativeRunner, "refuses", refuses)
    assert_logits_equal(fed_logits(model, KVCache.for_model(model), ids), uncached_logits(model, ids))
    assert native[-1] == 12
    fed_logits(model, KVCache.for_model(model), ids)
    assert native.count(12) == 1


def test_every_change_has_its_warning(native: list[int]) -> None:
    model, ids = tiny_llama(), random_ids(1, 12)
    attach(model, native=True)
    config = model.config
    with pytest.warns(RuntimeWarning, match="config"):
        config.pad_token_id = 3
        fed_logits(model, KVCache.for_model(model), ids)
    config.pad_token_id = tiny_llama().config.pad_token_id
    native.clear()
    fed_logits(model, KVCache.for_model(model), ids)
    assert native == [12]
    by_data(model, pytest.MonkeyPatch())
    with pytest.warns(RuntimeWarning, match="weights"):
        fed_logits(model, KVCache.for_model(model), ids)


def test_the_older_name_of_the_cache_is_not_the_newer_one(native: list[int]) -> None:
    model, ids = tiny_llama(), random_ids(1, 12)
    attach(model, native=True)
    native.clear()
    cache, name = KVCache.for_model(model), cache_keyword(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers' own
        if name != "past_key_values":
            model(ids, past_key_values=cache, **{name: None})
            assert cache.seen_tokens == 0
        n_names = len(inspect.signature(type(model).forward).parameters) - 2  # without itself, and all others by name
        with pytest.raises(TypeError):
            model(ids, *[None] * n_names, **cache_argument(model, cache))
    assert not native


def test_functions_that_were_compiled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    monkeypatch.setattr(sys.modules[type(model).__module__], "__compiled_fn_1_ab", lambda: None, raising=False)
    assert attach(model, native=True).is_native


def test_a_forward_whose_model_is_gone() -> None:
    model = tiny_llama()
    attach(model, native=True)
    forward = model.forward
    del model
    gc.collect()
    for use in (forward, copy.deepcopy):
        with pytest.raises(StateError, match="gone"):
            use(random_ids(1, 4) if use is forward else forward)


def test_a_forward_that_somebody_else_put_there_stays() -> None:
    model, ids = tiny_llama(), random_ids(1, 12)
    attach(model)
    own = model.forward
    model.forward = functools.partial(own)
    wrapper = model.forward
    with pytest.raises(UnsupportedError, match="forward"):
        attach(model, native=True)
    assert model.forward is wrapper
    assert_logits_equal(fed_logits(model, KVCache.for_model(model), ids), uncached_logits(model, ids))


def test_a_hook_that_is_gone_costs_nothing_more(native: list[int]) -> None:
    model, ids = tiny_llama(), random_ids(1, 24)
    attachment = attach(model, native=True)
    native.clear()
    expected = uncached_logits(model, ids)
    handle = layer_of(model).mlp.register_forward_pre_hook(lambda module, inputs: None)
    cache = KVCache.for_model(model)
    fed_logits(model, cache, ids[:, :12])
    assert "hook" in str(attachment.native_reason)
    handle.remove()
    assert_logits_equal(fed_logits(model, cache, ids[:, 12:]), expected[:, 12:])
    assert native == [12]
    assert attachment.native_reason is None


def test_hooks_of_libraries_are_called_too(native: list[int]) -> None:
    model, ids = tiny_llama(), random_ids(1, 40)
    attach(model)
    expected = fidelity(model, ids, prefilled=8, format="int8").output_errors
    attach(model, native=True)
    native.clear()
    found = fidelity(model, ids, prefilled=8, format="int8").output_errors
    assert found == expected
    assert found
    assert not native


def emptied(model: Any) -> None:
    layer_of(model).mlp.down_proj.weight.untyped_storage().resize_(0)


def with_placeholders(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)


@pytest.mark.parametrize("change", [emptied, with_placeholders])
def test_weights_that_are_gone_are_not_read(change: Callable[[Any], None], native: list[int]) -> None:
    model, ids = tiny_llama(hidden_size=512), random_ids(1, 4)
    attach(model, native=True)
    native.clear()
    change(model)
    cache = KVCache.for_model(model)
    with pytest.warns(RuntimeWarning, match="weights"), contextlib.suppress(RuntimeError):  # torch's own, of no storage
        fed_logits(model, cache, ids)
    assert not native


def test_warnings_that_are_errors_come_once(native: list[int]) -> None:
    model, ids = tiny_llama(), random_ids(1, 12)
    attach(model, native=True)
    native.clear()
    in_place(model, pytest.MonkeyPatch())
    cache = KVCache.for_model(model)
    with pytest.raises(RuntimeWarning):
        fed_logits(model, cache, ids)
    assert_logits_equal(fed_logits(model, cache, ids), uncached_logits(model, ids))
    assert not native


def test_the_model_is_not_held() -> None:
    model, ids = tiny_llama(), random_ids(1, 12)
    attachment = attach(model, native=True)
    cache = KVCache.for_model(model)
    fed_logits(model, cache, ids)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model, attachment
        assert gone() is None
    finally:
        gc.enable()


def test_a_cache_that_another_model_reshaped(native: list[int]) -> None:
    first, second = tiny_llama(head_dim=64), tiny_llama(head_dim=8, seed=1)
    ids = random_ids(1, 24)
    attach(first, native=True)
    attach(second)
    native.clear()
    cache = KVCache.for_model(first)
    for model in (first, second, first, first):
        assert_logits_equal(fed_logits(model, cache, ids, [20, 4]), uncached_logits(model, ids))
        cache.reset()
    assert len(native) >= 4


def test_a_cache_is_exact_or_refuses(native: list[int]) -> None:
    model, ids = tiny_llama().to(torch.bfloat16), random_ids(1, 12)
    attach(model)
    exact, rounding = KVCache.for_model(model), KVCache.for_model(model, format="bf16")
    model.float()
    attach(model, native=True)
    native.clear()
    with pytest.raises(UnsupportedError, match="exactly"):
        fed_logits(model, exact, ids)
    fed_logits(model, rounding, ids)
    assert native == [12]
    assert set(rounding.dtypes.values()) == {torch.float32}


def test_a_cache_outlives_its_model(native: list[int]) -> None:
    model, other, ids = tiny_llama(), tiny_llama(), random_ids(1, 12)
    attach(model, native=True)
    attach(other)
    native.clear()
    cache = KVCache.for_model(other)
    del other
    gc.collect()
    assert_logits_equal(fed_logits(model, cache, ids), uncached_logits(model, ids))
    assert native == [12]


def test_a_model_of_several_dtypes_is_refused() -> None:
    model = tiny_llama().to(torch.bfloat16)
    model.model.norm.float()
    model.lm_head = copy.deepcopy(model.lm_head).float()
    with pytest.raises(UnsupportedError, match="one dtype"):
        attach(model, native=True)
    assert "forward" not in vars(model)


WRONG: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "positions of one axis": lambda ids: {"input_ids": ids, "position_ids": torch.arange(12)},
    "positions of three axes": lambda ids: {"input_ids": ids, "position_ids": torch.arange(12).expand(3, 2, 12)},
    "positions of three sequences": lambda ids: {"input_ids": ids, "position_ids": torch.arange(12).expand(3, 12)},
    "small ids": lambda ids: {"input_ids": ids.to(torch.int16)},
    "labels": lambda ids: {"input_ids": ids, "labels": False},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_the_model_refuses_is_refused(name: str, native: list[int]) -> None:
    model, ids = tiny_llama(), random_ids(2, 12)
    attach(model, native=True)
    native.clear()
    cache = KVCache.for_model(model)
    with torch.no_grad(), pytest.raises((RuntimeError, TypeError, ValueError, IndexError)):
        model(**WRONG[name](ids), **keyword(model, cache))
    with torch.no_grad(), pytest.raises(TypeError):
        model(ids, input_ids=ids, **keyword(model, cache))
    assert not native
    cache.truncate(0)
    assert_logits_equal(fed_logits(model, cache, ids), uncached_logits(model, ids))


def unpickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled])
def test_a_copy_of_the_model_runs_its_own_weights(copied: Callable[[Any], Any], native: list[int]) -> None:
    model, ids = tiny_llama(), random_ids(1, 24)
    attach(model, native=True)
    twin = copied(model)
    by_data(twin, pytest.MonkeyPatch())
    native.clear()
    found = fed_logits(twin, KVCache.for_model(twin), ids)
    assert not native
    assert_logits_equal(found, uncached_logits(twin, ids))
    fed_logits(model, KVCache.for_model(model), ids)
    assert native == [24]


def test_a_model_of_another_kind_is_left_as_it_was() -> None:
    model = tiny_bart()
    with pytest.raises(UnsupportedError):
        attach(model, native=True)
    assert model.config._attn_implementation != "stratakv"
    assert "forward" not in vars(model)
    attach(model)
    with pytest.raises(UnsupportedError):
        attach(model, native=True)
    assert model.config._attn_implementation == "stratakv"


def test_a_forward_that_stopped_is_to_be_taken_back_first() -> None:
    model, ids = tiny_llama(), random_ids(1, 12)
    attach(model, native=True)
    cache = KVCache.for_model(model)
    fed_logits(model, cache, ids)
    cache.update(*(torch.zeros(1, model.config.num_key_value_heads, 1, model.config.head_dim) for _ in range(2)), 0)
    with pytest.raises(StateError, match="truncate"):
        fed_logits(model, cache, ids)
    cache.truncate(12)
    assert_logits_equal(fed_logits(model, cache, ids), uncached_logits(model, torch.cat([ids, ids], 1))[:, 12:])
