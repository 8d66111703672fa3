"""The native runner against transformers: every family that it serves, in any cut, with every instruction set."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from attention_checks import threads
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache

from stratakv.blocks.batch import SequenceBatch
from stratakv.errors import CapacityError, ConfigurationError, UnsupportedError
from stratakv.extension import instruction_sets, is_built, load_kernels
from stratakv.integrations.transformers import KVCache
from stratakv.integrations.transformers.compat import cache_keyword
from stratakv.models.native import NativeRunner
from stratakv.policies import Window
from stratakv.testing.running import visibility_mask, window_visibility
from stratakv.testing.tiny import (
    VOCABULARY,
    tiny_gemma2,
    tiny_gemma3,
    tiny_llama,
    tiny_mistral,
    tiny_qwen2,
    tiny_qwen3,
    tiny_t5,
)

pytestmark = pytest.mark.skipif(not is_built(), reason="installed without the extension, on purpose or for want of g++")

every_isa = pytest.mark.parametrize("isa", instruction_sets())
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "llama with biases": partial(tiny_llama, attention_bias=True, mlp_bias=True),
    "llama with untied odd sizes": partial(
        tiny_llama, hidden_size=36, intermediate_size=52, head_dim=10, num_attention_heads=6, tie_word_embeddings=False
    ),
    "llama 3 rotation": partial(tiny_llama, rope_parameters=LLAMA3),
    "llama with tied embeddings": partial(tiny_llama, tie_word_embeddings=True),
    "mistral": partial(tiny_mistral, window=9),
    "mistral without a window": partial(tiny_mistral, sliding_window=None),
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "gemma2": partial(tiny_gemma2, window=9),
    "gemma3": partial(tiny_gemma3, window=9),
}


def takes_tiles(isa: str) -> bool:
    """Whether it multiplies bf16 matrices with bf16 numbers."""
    return bool(load_kernels(isa)[0].tiles_bf16(isa))


def drawn(name: str) -> Any:
    """One of MODELS whose vectors are random, too: norms and biases that do nothing would hide what is wrong."""
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def some_tokens(n_sequences: int, n: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (n_sequences, n), generator=torch.Generator().manual_seed(seed))


def logits_of(model: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(tokens, attention_mask=mask).logits
    return found


def fed(runner: NativeRunner, batch: SequenceBatch, tokens: Tensor, cuts: list[int]) -> Tensor:
    """Logits of all tokens, fed in pieces of the sizes `cuts`, the last of which repeats.

    The runner's own room is NaN before each: nothing of it may be read before it is written.
    """
    found: list[Tensor] = []
    start = 0
    while start < tokens.shape[1]:
        n = cuts[min(len(found), len(cuts) - 1)]
        for binding in runner._bindings.values():
            with torch.inference_mode():
                for room in binding._room.values():
                    room.fill_(torch.nan)
        found.append(runner.forward(batch, tokens[:, start : start + n], every=True))
        batch.memory.check()
        start += n
    return torch.cat(found, dim=1)


@every_isa
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(isa: str, name: str) -> None:
    model = drawn(name)
    runner = NativeRunner(model, dtype=torch.float32, isa=isa)
    for n_sequences in (1, 3, 5):
        tokens = some_tokens(n_sequences, 40)
        expected = logits_of(model, tokens)
        for cuts in ([40], [1], [7], [2], [23, 1]):
            assert_same(fed(runner, runner.new_batch(format="fp32", block_tokens=4), tokens, cuts), expected)


@every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_weights_of_16_bits_are_rounded_and_nothing_else(isa: str, dtype: torch.dtype, name: str) -> None:
    model = drawn(name)
    runner = NativeRunner(model, dtype=dtype, exact=True, isa=isa)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.to(dtype).float()
    tolerance = 2e-4 if takes_tiles(isa) and dtype == torch.bfloat16 else 2e-5
    for n_sequences in (1, 5, 17):
        tokens = some_tokens(n_sequences, 30)
        found = fed(runner, runner.new_batch(format="fp32"), tokens, [17, 1])
        expected = logits_of(model, tokens)
        scale = float(expected.abs().max())
        torch.testing.assert_close(found / scale, expected / scale, rtol=tolerance, atol=tolerance)


@every_isa
def test_activations_are_rounded_to_bf16_at_most_and_alike_in_any_cut(isa: str) -> None:
    model = tiny_llama()
    runner = NativeRunner(model, dtype=torch.bfloat16, isa=isa)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.data = weight.data.bfloat16().float()
    tokens = some_tokens(5, 30)
    whole, *others = [fed(runner, runner.new_batch(format="fp32"), tokens, cuts) for cuts in ([30], [1], [17, 1], [2])]
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and takes_tiles(isa):
            module.register_forward_pre_hook(lambda _, given: (given[0].bfloat16().float(), *given[1:]))
    # Sums in another order round to the other side now and then, which is a step of bf16 then. All roundings: 5e-3.
    for expected, allowed in ((logits_of(model, tokens), 2e-3), *((other, 1e-3) for other in others)):
        assert (whole - expected).square().mean().sqrt() <= allowed * expected.square().mean().sqrt()
    one = [fed(runner, runner.new_batch(format="fp32"), tokens[:1], cuts) for cuts in ([30], [1])]
    assert (one[0] - one[1]).square().mean().sqrt() <= 1e-3 * one[0].square().mean().sqrt()


@every_isa
@pytest.mark.parametrize("name", MODELS)
def test_prompts_over_bf16_pages_are_rounded_to_bf16_at_most(isa: str, name: str) -> None:
    runners = [NativeRunner(drawn(name), dtype=torch.bfloat16, exact=exact, isa=isa) for exact in (True, False)]
    for n_sequences, cuts in ((1, [70]), (2, [40, 30])):  # enough queries a KV head for the kernel for prompts
        tokens = some_tokens(n_sequences, 70)
        exact, rounded = (fed(each, each.new_batch(format="bf16"), tokens, cuts) for each in runners)
        assert (exact - rounded).square().mean().sqrt() <= 1.5e-2 * exact.square().mean().sqrt()


@every_isa
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("hidden", "intermediate", "shape"), [(2040, 2080, (1, 97)), (256, 288, (900, 1)), (96, 40, (3, 170))]
)
def test_matrices_of_any_width_have_room(
    isa: str, exact: bool, hidden: int, intermediate: int, shape: tuple[int, int]
) -> None:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 1, "head_dim": 8}
    model = tiny_llama(**sizes)
    runner = NativeRunner(model, dtype=torch.bfloat16, exact=exact, isa=isa)
    tokens = some_tokens(*shape)
    found, expected = runner.forward(runner.new_batch(format="fp32"), tokens, every=True), logits_of(model, tokens)
    assert (found - expected).square().mean().sqrt() <= 0.05 * expected.square().mean().sqrt()


@every_isa
@pytest.mark.parametrize("intermediate", [8, 16, 17, 40, 47])
def test_nothing_behind_a_bias_is_read(isa: str, intermediate: int) -> None:
    model = tiny_llama(intermediate_size=intermediate, mlp_bias=True, attention_bias=True)
    runner = NativeRunner(model, dtype=torch.bfloat16, isa=isa)
    tokens = some_tokens(3, 20)
    expected = runner.forward(runner.new_batch(format="fp32"), tokens, every=True)
    for layer in runner.weights.layers:
        for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
            assert linear.bias is not None
            followed = torch.nn.functional.pad(linear.bias, (0, 64), value=math.nan)
            object.__setattr__(linear, "bias", followed[: len(linear.bias)])
    assert torch.equal(runner.forward(runner.new_batch(format="fp32"), tokens, every=True), expected)


@every_isa
@pytest.mark.parametrize("format_name", ["fp16", "bf16"])
def test_numbers_beyond_a_format_are_stored_as_its_largest(isa: str, format_name: str) -> None:
    model = tiny_llama(num_hidden_layers=1)
    model.model.layers[0].self_attn.v_proj.weight.data *= 1e6
    tokens = some_tokens(1, 20)
    cache = KVCache.for_model(model, format=format_name)
    expected = model(tokens, **{cache_keyword(model): cache}, use_cache=True).logits
    runner = NativeRunner(model, dtype=torch.float32, isa=isa)
    batch = runner.new_batch(format=format_name)
    torch.testing.assert_close(runner.forward(batch, tokens, every=True), expected, rtol=2e-5, atol=2e-5)
    stored = batch.view(0).gather(torch.float32)[1]
    assert torch.equal(stored, cache.batch.view(0).gather(torch.float32)[1])
    assert (stored == 65504).any() == (format_name == "fp16")


@pytest.mark.parametrize("format_name", ["fp32", "bf16", "fp16"])
def test_the_cache_holds_what_transformers_holds(format_name: str) -> None:
    model = tiny_qwen3()
    runner = NativeRunner(model, dtype=torch.float32)
    tokens = some_tokens(2, 21)
    batch = runner.new_batch(format=format_name, block_tokens=8)
    fed(runner, batch, tokens, [10, 1])
    cache = DynamicCache()
    with torch.inference_mode():
        model(tokens, **{cache_keyword(model): cache})
    tolerance = {"fp32": 1e-5, "bf16": 2**-8, "fp16": 2**-11}[format_name]
    for index, layer in enumerate(cache.layers):
        keys, values = batch.view(index).gather(torch.float32)
        for found, expected in ((keys, layer.keys), (values, layer.values)):  # later layers see rows that were rounded
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=4 * tolerance)


def test_forks_truncations_and_a_second_cache() -> None:
    model = tiny_gemma3(window=9)
    runner = NativeRunner(model, dtype=torch.float32)
    tokens, other = some_tokens(1, 30), some_tokens(1, 30, seed=2)
    batch, second = (runner.new_batch(format="fp32", block_tokens=4) for _ in range(2))
    runner.forward(batch, tokens[:, :20])
    runner.forward(second, other[:, :5])
    twin = batch.fork()
    mixed = torch.cat([tokens[:, :20], other[:, 20:]], dim=1)
    assert_same(runner.forward(twin, mixed[:, 20:])[:, 0], logits_of(model, mixed)[:, -1])
    assert_same(runner.forward(batch, tokens[:, 20:])[:, 0], logits_of(model, tokens)[:, -1])
    assert_same(runner.forward(second, other[:, 5:])[:, 0], logits_of(model, other)[:, -1])
    batch.memory.check()


def test_a_window_imposed_on_full_attention_and_its_sinks() -> None:
    model = tiny_llama(num_hidden_layers=1)
    runner = NativeRunner(model, dtype=torch.float32)
    tokens = some_tokens(1, 60)
    batch = runner.new_batch(format="fp32", block_tokens=4, policy=Window(12, sinks=3))
    expected = logits_of(model, tokens, visibility_mask(window_visibility(60, 12, sinks=3)))
    assert_same(fed(runner, batch, tokens, [25, 1]), expected)


@every_isa
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("window", "sinks"), [(7, 0), (33, 3), (20, 20), (200, 0)])
def test_a_window_hides_the_same_from_long_prompts(isa: str, exact: bool, window: int, sinks: int) -> None:
    """Rounding moves logits by 0.015 of their size at most; a few rows too many, by 0.17 and more."""
    model, tokens = tiny_llama(num_hidden_layers=1), some_tokens(1, 600)
    runner = NativeRunner(model, dtype=torch.bfloat16, exact=exact, isa=isa)
    batch = runner.new_batch(format="bf16", block_tokens=4, policy=Window(window, sinks=sinks))
    with threads(2):  # units of other sizes than with one
        found = fed(runner, batch, tokens, [100])
    expected = logits_of(model, tokens, visibility_mask(window_visibility(600, window, sinks)))
    assert ((found - expected).norm(dim=-1) < 0.05 * expected.norm(dim=-1)).all()


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_threads_that_share_a_runner_take_turns() -> None:
    model = tiny_gemma3(window=9)
    runner = NativeRunner(model, dtype=torch.float32)
    texts = [some_tokens(1 + i, 40, seed=i) for i in range(4)]

    def run(tokens: Tensor) -> Tensor:
        batch = runner.new_batch(format="fp32", block_tokens=4)
        steps = [tokens[:, :3], *tokens[:, 3:].split(1, dim=1)]
        return torch.cat([runner.forward(batch, step, every=True) for step in steps], dim=1)

    with ThreadPoolExecutor(len(texts)) as pool:
        for tokens, found in zip(texts, pool.map(run, texts), strict=True):
            assert_same(found, logits_of(model, tokens))


def test_a_step_makes_no_tensor() -> None:
    """But for the logits, if they are not given a place, and the table of blocks, when there is a new block."""
    runner = NativeRunner(tiny_llama())
    batch = runner.new_batch(block_tokens=16)
    tokens = some_tokens(2, 17).to(torch.int32)
    runner.forward(batch, tokens)
    one, logits = tokens[:, :1].contiguous(), torch.empty(2, 1, VOCABULARY)
    runner.forward(batch, one, out=logits)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(10):
            runner.forward(batch, one, out=logits)
    assert not [event for event in profiled.key_averages() if event.self_cpu_memory_usage > 0]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(10):
            runner.forward(batch, one, out=logits)
    assert [event for event in profiled.key_averages() if event.self_cpu_memory_usage > 0], (
        "a block came in: it is seen"
    )


def test_next_tokens_are_the_likeliest() -> None:
    runner = NativeRunner(tiny_qwen3(), dtype=torch.float32)
    for n_sequences in (1, 3):
        tokens = some_tokens(n_sequences, 12)
        one, other = runner.new_batch(), runner.new_batch()
        for start, stop in ((0, 7), (7, 8), (8, 12)):
            logits = runner.forward(one, tokens[:, start:stop])
            found = runner.next_tokens(other, tokens[:, start:stop])
            assert found.dtype == torch.int64
            assert not found.is_inference()
            assert torch.equal(found, logits.argmax(-1))
        before = found.clone()
        runner.next_tokens(other, tokens[:, :1])
        assert torch.equal(found, before)  # the result is the caller's
    with pytest.raises(ConfigurationError):
        runner.next_tokens(other, torch.tensor([[VOCABULARY]]))
    with pytest.raises(ConfigurationError):
        runner.next_tokens("batch", tokens)  # type: ignore[arg-type]  # on purpose


def test_a_batch_is_asked_for_in_terms_that_there_are() -> None:
    model = tiny_llama()
    for new in (NativeRunner(model).new_batch, partial(KVCache.for_model, model)):
        with pytest.raises(ConfigurationError, match="unknown format ''"):
            new(format="")
        with pytest.raises(ConfigurationError, match="RetentionPolicy"):
            new(policy=5)  # type: ignore[arg-type]  # on purpose


def test_long_prompts_go_in_several_passes() -> None:
    model = tiny_mistral(window=100)
    runner = NativeRunner(model, dtype=torch.float32)
    tokens = some_tokens(2, 700)
    batch = runner.new_batch(format="fp32")
    assert_same(runner.forward(batch, tokens, every=True), logits_of(model, tokens))
    batch = runner.new_batch(format="fp32")
    assert_same(runner.forward(batch, tokens)[:, 0], logits_of(model, tokens)[:, -1])


@pytest.mark.parametrize("last", [1, 2, 188, 189, 500, 700])
def test_logits_of_the_last_tokens(last: int) -> None:
    """Those of two passes, of 256 tokens each and the rest, too."""
    model = tiny_llama()
    runner = NativeRunner(model, dtype=torch.float32)
    tokens = some_tokens(2, 700)
    batch = runner.new_batch(format="fp32")
    assert_same(runner.forward(batch, tokens, last=last), logits_of(model, tokens)[:, -last:])
    for wrong in (0, -1, 701):
        with pytest.raises(ConfigurationError, match="last"):
            runner.forward(runner.new_batch(format="fp32"), tokens, last=wrong)


@pytest.mark.parametrize(
    "tokens",
    [
        torch.zeros(1, 0, dtype=torch.int64),
        torch.zeros(3),
        torch.tensor([[VOCABULARY]]),
        torch.tensor([[-1]]),
        torch.tensor([[True]]),
        torch.tensor([[1j]]),
        torch.ones(1, 1, dtype=torch.int64, device="meta"),
        torch.ones(1, 1, dtype=torch.int64).to_sparse(),
        [[1]],
        None,
    ],
    ids=str,
)
def test_tokens_that_are_none_are_refused(tokens: Any) -> None:
    runner = NativeRunner(tiny_llama())
    batch = runner.new_batch()
    runner.forward(batch, some_tokens(1, 5))
    with pytest.raises(ConfigurationError, match="token"):
        runner.forward(batch, tokens)
    assert batch.seen_tokens == 5
    batch.memory.check()


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(1, 1, VOCABULARY - 1),
        torch.empty(1, 1, VOCABULARY, dtype=torch.float64),
        torch.empty(1, VOCABULARY, 2).transpose(1, 2)[:, :1],
        torch.empty(1, 1, VOCABULARY, requires_grad=True),
        torch._neg_view(torch.empty(1, 1, VOCABULARY)),
        [0.0] * VOCABULARY,
    ],
    ids=["narrow", "fp64", "with gaps", "with gradient", "negated", "list"],
)
def test_places_for_logits_that_do_not_fit_are_refused(out: Any) -> None:
    runner = NativeRunner(tiny_llama())
    batch = runner.new_batch()
    with pytest.raises(ConfigurationError, match="logits"):
        runner.forward(batch, some_tokens(1, 5), out=out)
    assert not batch.sequences
    with pytest.raises(ConfigurationError, match="new_batch"):
        runner.forward(None, some_tokens(1, 5))  # type: ignore[arg-type]  # on purpose


def test_a_forward_that_fails_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the angles of more positions cannot be had, neither are they claimed."""
    model = tiny_llama()
    runner = NativeRunner(model, dtype=torch.float32)
    batch, tokens = runner.new_batch(), some_tokens(1, 4100)
    expected = logits_of(model, tokens)[:, -1]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "arange", lambda *_, **__: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                runner.forward(batch, tokens)
    assert not batch.sequences
    batch.memory.check()
    assert_same(runner.forward(batch, tokens)[:, 0], expected)


def test_a_forward_that_there_is_no_room_for_evicts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = NativeRunner(tiny_gemma3(window=9), dtype=torch.float32)
    batch = runner.new_batch(block_tokens=1)
    runner.forward(batch, some_tokens(1, 20))

    def refuse(nbytes: int) -> Tensor:
        raise MemoryError(f"no room for {nbytes:,} bytes")

    with monkeypatch.context() as patch:
        patch.setattr("stratakv.models.native.binding.zeros", refuse)
        with pytest.raises(CapacityError, match="nothing was changed"):
            runner.forward(batch, some_tokens(1, 300))
    batch.truncate(12)  # rows of the windows are there still
    assert batch.seen_tokens == 12


def test_a_dropped_cache_frees_its_memory() -> None:
    runner = NativeRunner(tiny_llama())
    batch = runner.new_batch()
    runner.forward(batch, some_tokens(1, 5))
    memory = weakref.ref(batch.memory)
    del batch
    gc.collect()
    assert memory() is None


def test_a_cache_of_another_model_is_refused() -> None:
    runner = NativeRunner(tiny_llama())
    other = NativeRunner(tiny_llama(num_key_value_heads=4)).new_batch()
    with pytest.raises(ConfigurationError, match="another shape"):
        runner.forward(other, some_tokens(1, 5))
    assert other.seen_tokens == 0
    assert not other.sequences


def test_other_families_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="T5"):
        NativeRunner(tiny_t5())
    with pytest.raises(UnsupportedError, match="dynamic"):
        NativeRunner(tiny_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}))
    with pytest.raises(UnsupportedError, match="no layers"):
        NativeRunner(tiny_llama(num_hidden_layers=0))
    with pytest.raises(UnsupportedError, match="relu"):
        NativeRunner(tiny_llama(hidden_act="relu"))
    with pytest.raises(ConfigurationError, match="float64"):
        NativeRunner(tiny_llama(), dtype=torch.float64)
