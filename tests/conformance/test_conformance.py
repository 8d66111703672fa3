"""The suites for third parties pass on everything built in, and fail on parts that are wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stratakv.attention import AttentionOptions, CpuBackend, ReferenceBackend
from stratakv.blocks.view import KVView
from stratakv.codecs import codec_names, get_codec
from stratakv.codecs.floats import BFloat16, Float32
from stratakv.extension import instruction_sets
from stratakv.plan import KeepPlan, Run
from stratakv.policies import RetentionPolicy, Window
from stratakv.spec import PageLayout, Retention
from stratakv.testing.conformance import check_backend, check_codec, check_policy

POLICIES = [Window(1), Window(4), Window(7, sinks=1), Window(5, sinks=6), Window((2, 4, 9, 30), sinks=2)]


@pytest.mark.parametrize("name", codec_names())
def test_built_in_codecs(name: str) -> None:
    check_codec(get_codec(name))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: str(policy.to_dict()))
@pytest.mark.parametrize("block_tokens", [1, 4, 16])
def test_built_in_policies(policy: RetentionPolicy, block_tokens: int) -> None:
    check_policy(policy, block_tokens=block_tokens)


def test_the_reference_backend() -> None:
    check_backend(ReferenceBackend())


@pytest.mark.parametrize("isa", instruction_sets())
def test_the_cpu_backend(isa: str) -> None:
    check_backend(CpuBackend(isa))


# Wrong parts, each in one way


class ShiftedRows(Float32):
    def encode(self, layout: PageLayout, pages: Tensor, block: Tensor, row: Tensor, values: Tensor) -> None:
        super().encode(layout, pages, block, (row + 1) % layout.block_tokens, values)


class DependsOnChunks(Float32):
    def encode(self, layout: PageLayout, pages: Tensor, block: Tensor, row: Tensor, values: Tensor) -> None:
        super().encode(layout, pages, block, row, values)
        pages[0, 0, -1] = len(values) % 2 if layout.nbytes > layout.payload_bytes else pages[0, 0, -1]


class PromisesTooMuch(BFloat16):
    def rounded(self, values: Tensor, block_tokens: int = 64) -> Tensor:
        return values


class ScrubsTooMuch(Float32):
    def scrub(self, layout: PageLayout, pages: Tensor, n_rows: int) -> None:
        super().scrub(layout, pages, max(n_rows - 1, 0))


class ForgetsToScrub(Float32):
    def scrub(self, layout: PageLayout, pages: Tensor, n_rows: int) -> None:
        pass


@pytest.mark.parametrize("codec", [ShiftedRows, DependsOnChunks, PromisesTooMuch, ScrubsTooMuch, ForgetsToScrub])
def test_a_wrong_codec_fails(codec: Any) -> None:
    with pytest.raises(AssertionError):
        check_codec(codec())


class KeepsTooLittle(Window):
    def keep(self, retention: Retention, seen_tokens: int, runs: tuple[Run, ...], block_tokens: int) -> KeepPlan | None:
        narrow = Retention((retention.window or 0) - 1, retention.sinks)
        return super().keep(narrow, seen_tokens, runs, block_tokens)


class PromisesTooFarBack(Window):
    def keep(self, retention: Retention, seen_tokens: int, runs: tuple[Run, ...], block_tokens: int) -> KeepPlan | None:
        plan = super().keep(retention, seen_tokens, runs, block_tokens)
        return plan and KeepPlan(plan.runs, plan.floor - 1)


class InventsRows(Window):
    def keep(self, retention: Retention, seen_tokens: int, runs: tuple[Run, ...], block_tokens: int) -> KeepPlan | None:
        return KeepPlan((*runs, (seen_tokens + 1, 1)), 0)


@pytest.mark.parametrize("policy", [KeepsTooLittle, PromisesTooFarBack, InventsRows])
def test_a_wrong_policy_fails(policy: Any) -> None:
    with pytest.raises(AssertionError):
        check_policy(policy(6), block_tokens=1)


class IgnoresMask(ReferenceBackend):
    def run(self, query: Tensor, view: KVView, options: AttentionOptions) -> tuple[Tensor, Tensor]:
        return super().run(query, view, AttentionOptions(**{**vars(options), "mask": None}))


class WrongLse(ReferenceBackend):
    def run(self, query: Tensor, view: KVView, options: AttentionOptions) -> tuple[Tensor, Tensor]:
        out, lse = super().run(query, view, options)
        return out, lse / torch.log(torch.tensor(2.0))


@pytest.mark.parametrize("backend", [IgnoresMask, WrongLse])
def test_a_wrong_backend_fails(backend: Any) -> None:
    with pytest.raises(AssertionError):
        check_backend(backend())
