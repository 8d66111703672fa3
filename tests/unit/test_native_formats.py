"""The native runner over rows of few bits and recent ones in 16, against transformers over the same cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from stratakv import KVCache, attach
from stratakv.blocks.batch import SequenceBatch
from stratakv.codecs import get_codecs
from stratakv.errors import ConfigurationError
from stratakv.extension import instruction_sets, is_built, load_kernels
from stratakv.models.native import NativeRunner
from stratakv.policies import Window
from stratakv.testing.running import fed_logits, random_ids
from stratakv.testing.tiny import VOCABULARY, tiny_gemma3, tiny_llama, tiny_mistral, tiny_qwen3

pytestmark = pytest.mark.skipif(not is_built(), reason="installed without the extension, on purpose or for want of g++")

every_isa = pytest.mark.parametrize("isa", instruction_sets())
FORMATS = ("fp8", "int8", "int4", "int2")
every_format = pytest.mark.parametrize("name", FORMATS)
MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_llama,
    "odd head dim": partial(tiny_llama, hidden_size=36, head_dim=10, num_attention_heads=6),
    "mistral": partial(tiny_mistral, window=90),
    "gemma3": partial(tiny_gemma3, window=70),
    "qwen3": tiny_qwen3,
}
TOLERANCE = 2e-3
"""Kernels have queries and weights of 14 bits; sums in another order round a few numbers to the other side."""


def fed(runner: NativeRunner, batch: SequenceBatch, tokens: Tensor, chunks: list[int]) -> Tensor:
    found = []
    for piece in tokens.split(chunks, dim=1):
        found.append(runner.forward(batch, piece, every=True))
        batch.memory.check()
    return torch.cat(found, dim=1)


def assert_near(found: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, rtol=TOLERANCE, atol=TOLERANCE)


@every_isa
@every_format
@pytest.mark.parametrize("model_name", MODELS)
def test_logits_equal_those_of_transformers_over_the_same_cache(isa: str, name: str, model_name: str) -> None:
    model = MODELS[model_name]()
    runner = NativeRunner(model, dtype=torch.float32, isa=isa)
    tokens = random_ids(2, 210)
    for block_tokens, chunks in ((64, [150, *[1] * 60]), (16, [70, 1, 1, 90, 48]), (24, [210]), (1, [100, 1, 1, 108])):
        cache = KVCache.for_model(model, format=name, block_tokens=block_tokens)
        expected = fed_logits(model, cache, tokens, chunks)
        batch = runner.new_batch(format=name, block_tokens=block_tokens)
        assert_near(fed(runner, batch, tokens, chunks), expected)
        assert batch.memory.nbytes == cache.batch.memory.nbytes


@every_format
@pytest.mark.parametrize("chunks", [[200], [130, *[1] * 70], [63, 1, 1, 135], [*[1] * 200]])
def test_what_is_stored_is_what_the_codecs_give(name: str, chunks: list[int]) -> None:
    runner = NativeRunner(tiny_llama(num_hidden_layers=1), dtype=torch.float32)
    tokens = random_ids(2, 200)
    exact, batch = runner.new_batch(format="fp32"), runner.new_batch(format=name)
    fed(runner, exact, tokens, chunks)
    fed(runner, batch, tokens, chunks)
    batch.begin(2, 1)  # the next step: what is recent no more is read from its codes
    batch.abort()
    keys, values = exact.view(0).gather(torch.float32)
    (part,) = batch.view(0).parts
    n = part.n_rows
    assert n == 200
    found_keys, found_values = part.read(torch.float32)
    is_recent = torch.ones(n, dtype=torch.bool)
    if part.recent is not None:
        first, stop = part.plan.runs[0][0], sum(part.plan.runs[-1])
        is_recent[first:stop] = False
        near = get_codecs("bf16", "bf16")[0]
        for found, rows in ((found_keys, keys), (found_values, values)):
            assert torch.equal(found[:, :, is_recent], near.rounded(rows)[:, :, is_recent])
    else:
        is_recent[:] = False
    for found, rows, codec in zip((found_keys, found_values), (keys, values), get_codecs(name, name), strict=True):
        held = get_codecs("bf16", "bf16")[0].rounded(rows) if codec.group_rows(64) > 1 else rows
        assert torch.equal(found[:, :, ~is_recent], codec.rounded(held, 64)[:, :, ~is_recent])


@every_format
@pytest.mark.parametrize("policy", [None, Window(100, sinks=4)])
def test_forks_truncations_and_windows(name: str, policy: Window | None) -> None:
    model = tiny_llama()
    runner = NativeRunner(model, dtype=torch.float32)
    attach(model)
    tokens, other = random_ids(1, 170), random_ids(1, 100, seed=2)
    chunks, more = [150, *[1] * 20], [40, *[1] * 60]
    cache = KVCache.for_model(model, format=name, block_tokens=16, policy=policy)
    batch = runner.new_batch(format=name, block_tokens=16, policy=policy)
    assert_near(fed(runner, batch, tokens, chunks), fed_logits(model, cache, tokens, chunks))
    twin, other_cache = batch.fork(), cache.fork()
    for each, way in ((batch, cache), (twin, other_cache)):  # the second has all rows still
        if each is batch:
            each.truncate(165)
            way.truncate(165)
        assert_near(fed(runner, each, other, more), fed_logits(model, way, other, more))
    batch.memory.check()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_long_prompts_go_in_several_passes(name: str) -> None:
    model = tiny_mistral(window=100)
    runner = NativeRunner(model, dtype=torch.float32)
    tokens = random_ids(2, 700)
    batch = runner.new_batch(format=name)
    cache = KVCache.for_model(model, format=name)
    chunks = [650, *[1] * 50]
    assert_near(fed(runner, batch, tokens, chunks), fed_logits(model, cache, tokens, chunks))


@every_format
def test_a_step_makes_no_tensor(name: str) -> None:
    """But for tables of blocks where there is a new block, and for rows that are coded together."""
    runner = NativeRunner(tiny_llama())
    batch = runner.new_batch(format=name)
    tokens = random_ids(2, 150).to(torch.int32)
    runner.forward(batch, tokens[:, :129])
    one, logits = tokens[:, :1].contiguous(), torch.empty(2, 1, VOCABULARY)
    for _ in range(17):  # to the third row of a block
        runner.forward(batch, one, out=logits)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(8):
            runner.forward(batch, one, out=logits)
    assert not [event for event in profiled.key_averages() if event.self_cpu_memory_usage > 0]


def test_a_residual_that_is_too_short_is_refused() -> None:
    runner = NativeRunner(tiny_llama())
    with pytest.raises(ConfigurationError, match="at least 64"):
        runner.new_batch(format="int4", residual=10)
    batch = runner.new_batch(format="int8", residual=32)
    assert len(batch.memory.spec.groups) == 2


def steps(isa: str, dtype: torch.dtype, format: str, *, exact: bool) -> Tensor:
    """Logits of the steps behind a prompt, whose rows are read from their codes in part."""
    runner = NativeRunner(tiny_llama(), dtype=dtype, exact=exact, isa=isa)
    return fed(runner, runner.new_batch(format=format), random_ids(2, 150), [129, *[1] * 21])[:, 129:]


@every_isa
@pytest.mark.parametrize("name", ["int4", "int2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_in_16_bits_let_queries_be_rounded_beside_rows_of_few(isa: str, name: str, dtype: torch.dtype) -> None:
    exactly = steps(isa, dtype, name, exact=True)
    difference = (steps(isa, dtype, name, exact=False) - exactly).norm()
    # Of what the format itself has done. With matrices in tiles, activations are rounded to bf16, too.
    share = 0.75 if dtype == torch.bfloat16 and load_kernels(isa)[0].tiles_bf16(isa) else 0.25
    assert 0 < difference < share * (exactly - steps(isa, dtype, "fp32", exact=True)).norm()


@every_isa
@pytest.mark.parametrize("name", ["int4", "int2"])
def test_matrices_in_fp32_keep_queries_as_exact_does(isa: str, name: str) -> None:
    assert torch.equal(*(steps(isa, torch.float32, name, exact=exact) for exact in (True, False)))
