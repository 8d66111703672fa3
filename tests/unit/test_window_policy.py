"""A window never lacks a row that a query sees, frees what none sees, and knows exactly how far back it can go."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from stratakv.errors import ConfigurationError
from stratakv.plan import KeepPlan, Run
from stratakv.policies import Window
from stratakv.policies.whole_blocks import whole_blocks
from stratakv.spec import Retention
from stratakv.testing.runs import positions

SIZES = (1, 2, 3, 4, 5, 8, 13)
SINKS = (0, 1, 2, 4, 5, 9)
BLOCKS = (1, 2, 4, 7, 32)
STEPS = ([1] * 40, [17, 1, 1, 5, 1, 1, 9], [3] * 13, [40])


def sees(query: int, size: int, sinks: int) -> set[int]:
    return {p for p in range(query + 1) if p > query - size or p < sinks}


def streamed(
    size: int, sinks: int, block_tokens: int, steps: list[int]
) -> Iterator[tuple[int, tuple[Run, ...], KeepPlan | None]]:
    """(tokens seen, rows stored before the plan, plan) between the steps of a run that carries every plan out."""
    policy, retention = Window(size, sinks), Retention(size, sinks)
    runs: tuple[Run, ...] = ()
    seen = 0
    for n in steps:
        stored = positions(runs)
        for query in range(seen, seen + n):
            assert sees(query, size, sinks) <= {*stored, *range(seen, query + 1)}
        runs = (*runs[:-1], (runs[-1][0], runs[-1][1] + n)) if runs and sum(runs[-1]) == seen else (*runs, (seen, n))
        seen += n
        plan = policy.keep(retention, seen, runs, block_tokens)
        yield seen, runs, plan
        runs = plan.runs if plan else runs


@pytest.mark.parametrize("block_tokens", BLOCKS)
@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_no_query_lacks_a_row(block_tokens: int, steps: list[int]) -> None:
    for size, sinks in itertools.product(SIZES, SINKS):
        for seen, stored, plan in streamed(size, sinks, block_tokens, steps):
            left = positions(plan.runs if plan else stored)
            assert sees(seen, size, sinks) - {seen} <= set(left)


@pytest.mark.parametrize("block_tokens", BLOCKS)
@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_whole_blocks_go_and_all_of_them_that_can(block_tokens: int, steps: list[int]) -> None:
    for size, sinks in itertools.product(SIZES, SINKS):
        for seen, stored, plan in streamed(size, sinks, block_tokens, steps):
            flat = positions(stored)
            blocks = [flat[i : i + block_tokens] for i in range(0, len(flat), block_tokens)]
            wanted = sees(seen, size, sinks)
            expected = [p for block in blocks if wanted & set(block) for p in block]
            assert positions(plan.runs if plan else stored) == expected
            assert (plan is None) == (expected == flat)


@pytest.mark.parametrize("block_tokens", BLOCKS)
@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_a_cut_to_the_floor_or_above_is_exact(block_tokens: int, steps: list[int]) -> None:
    for size, sinks in itertools.product(SIZES, SINKS):
        for seen, _, plan in streamed(size, sinks, block_tokens, steps):
            if plan:
                stored = set(positions(plan.runs))
                for length in range(max(plan.floor, 1), seen + 1):
                    assert {p for p in sees(length, size, sinks) if p < length} <= stored


@pytest.mark.parametrize("block_tokens", BLOCKS)
@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_a_cut_below_the_floor_is_not_exact(block_tokens: int, steps: list[int]) -> None:
    for size, sinks in itertools.product(SIZES[1:], SINKS):
        for _, _, plan in streamed(size, sinks, block_tokens, steps):
            if plan and plan.floor > 1:
                below = plan.floor - 1
                assert not {p for p in sees(below, size, sinks) if p < below} <= set(positions(plan.runs))


def test_a_window_of_1_looks_back_at_nothing_so_any_cut_is_exact() -> None:
    for _, _, plan in streamed(1, 0, 4, [1] * 20):
        assert plan is None or plan.floor <= 1


@pytest.mark.parametrize("block_tokens", [1, 4, 16])
def test_rows_held_are_bounded(block_tokens: int) -> None:
    for size, sinks in itertools.product(SIZES, SINKS):
        for _, stored, plan in streamed(size, sinks, block_tokens, [1] * 200):
            n_rows = len(positions(plan.runs if plan else stored))
            assert n_rows <= size + sinks + 2 * block_tokens


def test_heads_can_have_windows_of_their_own() -> None:
    policy = Window((4, 6), sinks=1)
    assert policy.retention(0, 0) == policy.retention(5, 0) == Retention(4, 1)
    assert policy.retention(0, 1) == Retention(6, 1)
    with pytest.raises(ConfigurationError, match="2 KV heads"):
        policy.retention(0, 2)
    assert Window(3).retention(9, 9) == Retention(3, 0)


@pytest.mark.parametrize(("size", "sinks"), [(0, 0), (-1, 0), (4, -1), ((), 0), ((4, 0), 0)])
def test_a_window_that_holds_nothing_is_refused(size: int | tuple[int, ...], sinks: int) -> None:
    with pytest.raises(ConfigurationError, match="a window needs"):
        Window(size, sinks)


def test_what_differs_is_told_apart() -> None:
    described = [str(policy.to_dict()) for policy in (Window(4), Window(5), Window(4, sinks=1), Window((4, 5)))]
    assert len(set(described)) == 4


@pytest.mark.parametrize(
    ("runs", "wanted", "expected"),
    [
        (((0, 10),), ((9, 1),), ((8, 2),)),
        (((0, 10),), ((0, 1), (9, 1)), ((0, 4), (8, 2))),
        (((0, 10),), ((3, 2),), ((0, 8),)),
        (((2, 3), (9, 6)), ((9, 1),), ((2, 3), (9, 1))),  # blocks hold rows, whatever their positions
        (((2, 3), (9, 6)), ((10, 1),), ((10, 4),)),
        (((0, 8),), (), ()),
        ((), ((0, 3),), ()),
    ],
)
def test_wanted_positions_are_rounded_out_to_blocks_of_4(
    runs: tuple[Run, ...], wanted: tuple[Run, ...], expected: tuple[Run, ...]
) -> None:
    assert whole_blocks(runs, 4, wanted) == expected
