"""Tensors whose numbers lie nowhere: kernels would read address 0, and torch copies some of them without a word."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stratakv import KVCache
from stratakv.attention import backends
from stratakv.attention.base import AttentionBackend, AttentionOptions
from stratakv.blocks.batch import SequenceBatch
from stratakv.blocks.geometry import build_spec
from stratakv.blocks.memory import Memory
from stratakv.errors import ConfigurationError
from stratakv.extension import is_built
from stratakv.models.native import NativeRunner
from stratakv.spec import LayerSpec
from stratakv.tensors import has_numbers
from stratakv.testing.running import assert_logits_equal, fed_logits, random_ids, uncached_logits
from stratakv.testing.tiny import tiny_llama
from stratakv.testing.views import make_view

SHAPE = (1, 2, 4, 8)


def fake(rows: Tensor) -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        return mode.from_tensor(rows)


def wrapped(rows: Tensor) -> Tensor:
    with warnings.catch_warnings():  # torch's own deprecations
        warnings.simplefilter("ignore")
        from torch.testing._internal.two_tensor import TwoTensor

        pair: Tensor = TwoTensor(rows, rows)
        return pair


def mkldnn(rows: Tensor) -> Tensor:
    return rows.to_mkldnn() if rows.is_cpu and rows.is_floating_point() else rows.to_sparse()


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros without storage": lambda rows: torch._efficientzerotensor(rows.shape, dtype=rows.dtype, device=rows.device),
    "fake": fake,
    "wrapper": wrapped,
    "meta": lambda rows: rows.to("meta"),
    "mkldnn": mkldnn,
    "sparse": Tensor.to_sparse,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class Named(Tensor):
    """A subclass that has its numbers where a tensor has them."""


@every_kind
@pytest.mark.parametrize("which", [0, 1])
def test_rows_without_numbers_are_refused_and_nothing_is_lost(kind: str, which: int) -> None:
    spec = build_spec([LayerSpec(0, 2, 8, 8)], k_format="fp32", v_format="fp32")
    batch = SequenceBatch(Memory(spec, device=torch.get_default_device(), poison=True))
    rows = torch.randn(SHAPE)
    batch.begin(1, 4)
    given = [rows, rows]
    given[which] = KINDS[kind](rows)
    with pytest.raises(ConfigurationError, match="without numbers"):
        batch.write(0, given[0], given[1])
    found = batch.write(0, rows.as_subclass(Named), torch.nn.Parameter(rows)).gather(torch.float32)
    assert torch.equal(found[0], rows)
    assert torch.equal(found[1], rows)


@every_kind
@pytest.mark.parametrize("backend", backends(), ids=lambda backend: backend.name)
def test_queries_without_numbers_are_refused(kind: str, backend: AttentionBackend) -> None:
    view = make_view(1, 2, 10, 4)
    query, options = torch.randn(SHAPE), AttentionOptions(0.3)
    right = backend.run(query, view, options)
    with pytest.raises(ConfigurationError, match="numbers in memory"):
        backend.run(KINDS[kind](query), view, options)
    again = backend.run(query, view, options)
    assert torch.equal(right[0], again[0])


@every_kind
@pytest.mark.skipif(not is_built(), reason="installed without the extension, on purpose or for want of g++")
def test_a_runner_refuses_tokens_and_logits_without_numbers(kind: str) -> None:
    runner = NativeRunner(tiny_llama())
    batch, tokens = runner.new_batch(), torch.ones(1, 3, dtype=torch.int64, device="cpu")
    with pytest.raises(ConfigurationError, match="tokens are"):
        runner.forward(batch, KINDS[kind](tokens))
    logits = torch.empty(1, 1, runner.architecture.vocabulary, device="cpu")
    with pytest.raises(ConfigurationError, match="logits go into"):
        runner.forward(batch, tokens, out=KINDS[kind](logits))
    assert batch.seen_tokens == 0


def test_what_has_numbers() -> None:
    rows = torch.randn(SHAPE)
    for fit in (rows, rows[:0], rows.expand(3, *SHAPE[1:]), rows.transpose(1, 2), torch.nn.Parameter(rows)):
        assert has_numbers(fit)
    assert not torch.vmap(lambda row: torch.tensor(has_numbers(row)))(rows).any()


@pytest.mark.skipif(not is_built(), reason="installed without the extension, on purpose or for want of g++")
def test_an_unknown_instruction_set_stops_the_first_rows_and_not_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_llama(), random_ids(1, 6)
    monkeypatch.setenv("STRATAKV_ISA", "sse9")
    cache = KVCache.for_model(model)
    with pytest.raises(ConfigurationError, match="sse9"):
        fed_logits(model, cache, ids)
    monkeypatch.delenv("STRATAKV_ISA")
    cache.truncate(0)
    assert_logits_equal(fed_logits(model, cache, ids), uncached_logits(model, ids))
