"""`verify` passes what is right, and catches faults that are put in on purpose."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from stratakv.blocks import memory
from stratakv.blocks.advance import Advance, plan_advance
from stratakv.blocks.arena import Arena
from stratakv.blocks.batch import SequenceBatch
from stratakv.blocks.checkpoint import Checkpoint
from stratakv.blocks.sequence import Growth
from stratakv.blocks.view import KVView
from stratakv.errors import ConfigurationError
from stratakv.integrations.transformers import KVCache, attach
from stratakv.policies import Window
from stratakv.testing.running import random_ids
from stratakv.testing.tiny import tiny_gemma3, tiny_llama
from stratakv.verification import fidelity, verify

IDS = random_ids(1, 30, seed=11)
Mutation = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize(
    "ask",
    [
        lambda given: verify(given, IDS),
        lambda given: fidelity(given, IDS, prefilled=4),
        KVCache.for_model,
        lambda given: KVCache.load("a.kv", given),
        attach,
    ],
)
def test_what_attach_returns_is_no_model(ask: Callable[[Any], Any]) -> None:
    attachment = attach(tiny_llama())
    with pytest.raises(ConfigurationError, match="model is needed, got Attachment; the model is its attribute"):
        ask(attachment)
    with pytest.raises(ConfigurationError, match="model is needed, got str"):
        ask("HuggingFaceTB/SmolLM2-135M")
    with pytest.raises(ConfigurationError, match="model is needed, got Linear"):
        ask(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("layout", ["paged", "contiguous", "growing"])
@pytest.mark.parametrize("format_name", ["fp32", "bf16", "fp16", "fp8", "int8"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
def test_a_right_cache_passes_in_every_cut(make: Callable[[], Any], format_name: str, layout: str) -> None:
    options: dict[str, Any] = {"capacity": 48} if layout == "contiguous" else {}
    report = verify(make(), IDS, format=format_name, layout=layout, block_tokens=4, poison=True, **options)
    assert report.passed, report.first_divergence
    assert [cut.refused for cut in report.cuts] == [None] * 7
    assert report.to_dict()["first_divergence"] is None


@pytest.mark.parametrize("policy", [Window(6), Window(6, sinks=2), Window((5, 9))])
def test_an_attached_model_passes_under_a_policy_that_its_mask_cannot_express(policy: Window) -> None:
    model = tiny_llama()
    attach(model)
    report = verify(model, IDS, policy=policy, block_tokens=4, poison=True)
    assert report.passed, report.first_divergence


@pytest.mark.parametrize("n_tokens", range(1, 9))
def test_a_right_cache_passes_however_few_the_tokens(n_tokens: int) -> None:
    report = verify(tiny_llama(), IDS[0, :n_tokens], block_tokens=4, poison=True)
    assert report.passed, report.first_divergence


@pytest.mark.parametrize(
    ("token_ids", "said"),
    [
        ([], "at least one"),
        ([[1, 2], [3]], "expected sequence of length 2"),
        ([0.5, 1.0], "whole numbers"),
        ([5, 4000], "must lie in"),
        (list(range(90)) * 91, "positions"),
    ],
)
def test_tokens_that_cannot_be_fed_are_refused(token_ids: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        verify(tiny_llama(), token_ids)


def test_a_cut_that_raises_fails_and_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(Arena, "write", broken)
    report = verify(tiny_llama(), IDS)
    assert not report.passed
    assert {cut.raised for cut in report.cuts} == {"RuntimeError: shape mismatch"}
    assert (report.max_abs, report.kl, report.top1) == (None, None, None)


def test_numbers_that_json_has_not_are_spelt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Arena.read
    monkeypatch.setattr(Arena, "read", lambda *args: tuple(tensor * torch.nan for tensor in right(*args)))
    report = verify(tiny_llama(), IDS)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert not report.passed
    assert (found["max_abs"], found["first_divergence"]["error"]) == ("nan", "inf")


def positions_one_too_far(patch: pytest.MonkeyPatch) -> None:
    right = KVCache.get_seq_length
    patch.setattr(KVCache, "get_seq_length", lambda self, layer_idx=0: right(self, layer_idx) + (self.seen_tokens > 0))


def one_token_hidden(patch: pytest.MonkeyPatch) -> None:
    right = Arena.read

    def read(self: Arena, member: int, plan: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys, values = (tensor.clone() for tensor in right(self, member, plan, dtype))
        if plan.n_rows > 6:
            values[:, :, 2] = 0
        return keys, values

    patch.setattr(Arena, "read", read)


def two_blocks_swapped(patch: pytest.MonkeyPatch) -> None:
    right = Arena.segments

    def segments(self: Arena, sequence: int, block_ids: Any) -> Any:
        ids = list(block_ids)
        if len(ids) > 2:
            ids[0], ids[1] = ids[1], ids[0]
        return right(self, sequence, ids)

    patch.setattr(Arena, "segments", segments)


def shared_blocks_written_in_place(patch: pytest.MonkeyPatch) -> None:
    def advance(*args: Any) -> Advance:
        planned = plan_advance(*args)
        for i, (sequence, g, growth) in enumerate(planned.growths):
            if growth.replaces is not None:
                planned.growths[i] = (sequence, g, Growth(growth.n_blocks - 1, None))
        return planned

    patch.setattr(memory, "plan_advance", advance)


def one_row_too_many_after_truncation(patch: pytest.MonkeyPatch) -> None:
    right = SequenceBatch.truncate
    patch.setattr(SequenceBatch, "truncate", lambda self, n_tokens: right(self, min(n_tokens + 1, self.seen_tokens)))


def rolled_back_in_name_only(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SequenceBatch, "rollback", lambda self, mark: None)


def rolled_back_to_rows_that_are_not_shared_but_given_away(patch: pytest.MonkeyPatch) -> None:
    def rollback(self: SequenceBatch, mark: Checkpoint) -> None:
        if self.sequences != list(mark.sequences):
            self.reset()
        self.sequences, self.seen_tokens = list(mark.sequences), mark.seen_tokens

    patch.setattr(SequenceBatch, "rollback", rollback)


def rows_written_one_too_early(patch: pytest.MonkeyPatch) -> None:
    right = Arena.write

    def write(self: Arena, member: int, plan: Any, keys: Tensor, values: Tensor) -> None:
        if plan.row % plan.block_tokens:
            plan = replace(plan, row=plan.row - 1)
        right(self, member, plan, keys, values)

    patch.setattr(Arena, "write", write)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
@pytest.mark.parametrize(
    ("mutation", "cut"),
    [
        (positions_one_too_far, "one-by-one"),
        (one_token_hidden, "chunks-of-7"),
        (two_blocks_swapped, "prompt-then-decode"),
        (shared_blocks_written_in_place, "fork-in-the-middle"),
        (one_row_too_many_after_truncation, "truncate-and-refeed"),
        (rolled_back_in_name_only, "roll-back"),
        (rolled_back_to_rows_that_are_not_shared_but_given_away, "roll-back"),
        (rows_written_one_too_early, "chunks-of-7"),
    ],
)
def test_a_fault_put_in_on_purpose_is_caught(
    mutation: Mutation, cut: str, make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the cut that is there for it."""
    model = make()
    mutation(monkeypatch)
    report = verify(model, IDS, block_tokens=4)
    assert not report.passed
    caught = next(each for each in report.cuts if each.name == cut)
    assert not caught.passed
    assert caught.refused is None
    if (divergence := caught.first_divergence) is None:
        assert caught.raised  # the cache noticed by itself
    else:
        assert 0 <= divergence.token < IDS.shape[1]
        assert divergence.error > 1


def test_a_window_that_shows_one_key_too_many_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    attach(model)
    right = SequenceBatch.view

    def view(self: SequenceBatch, layer: int) -> KVView:
        found = right(self, layer)
        parts = [replace(part, retention=replace(part.retention, window=7)) for part in found.parts if part.retention]
        return replace(found, parts=tuple(parts))

    monkeypatch.setattr(SequenceBatch, "view", view)
    report = verify(model, IDS, policy=Window(6, sinks=1), block_tokens=4)
    assert not report.passed
