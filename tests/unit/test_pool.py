"""Block ids: each has as many holders as it was given, and a mistake is loud and changes nothing."""

from __future__ import annotations

import random

import pytest

from stratakv.blocks.pool import BlockPool, PoolUsage
from stratakv.errors import CapacityError, InvariantError


def pool_of(n_blocks: int) -> BlockPool:
    pool = BlockPool()
    pool.grow(n_blocks)
    return pool


def test_the_lowest_free_ids_go_out_first_and_in_rising_order() -> None:
    pool = pool_of(6)
    assert pool.alloc(4) == [0, 1, 2, 3]
    assert pool.release([2, 0]) == [2, 0]
    assert pool.alloc(3) == [0, 2, 4]


def test_more_than_is_free_is_refused_whole() -> None:
    pool = pool_of(3)
    pool.alloc(2)
    with pytest.raises(CapacityError, match="2 blocks wanted, 1 of 3"):
        pool.alloc(2)
    assert pool.n_free == 1
    pool.check([[0, 1]])


def test_a_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = pool_of(2)
    blocks = pool.alloc(1)
    pool.retain(blocks)
    assert pool.references(0) == 2
    assert pool.release(blocks) == []
    assert pool.release(blocks) == blocks
    assert pool.n_free == 2


def test_a_block_named_twice_is_released_twice() -> None:
    pool = pool_of(1)
    pool.alloc(1)
    pool.retain([0, 0])
    assert pool.references(0) == 3
    assert pool.release([0, 0]) == []
    assert pool.release([0]) == [0]


@pytest.mark.parametrize("blocks", [[0], [1, 0], [1, 1], [3], [-1], [1, -1]])
def test_releasing_what_is_not_held_is_loud_and_changes_nothing(blocks: list[int]) -> None:
    pool = pool_of(3)
    pool.alloc(2)
    pool.release([0])
    with pytest.raises(InvariantError, match="released"):
        pool.release(blocks)
    assert pool.check([[1]]) == PoolUsage(free=2, held=1, cached=0, total=3)


@pytest.mark.parametrize("blocks", [[0], [1, 0], [3], [-1]])
def test_retaining_what_is_not_held_is_loud_and_changes_nothing(blocks: list[int]) -> None:
    pool = pool_of(3)
    pool.alloc(2)
    pool.release([0])
    with pytest.raises(InvariantError, match="held"):
        pool.retain(blocks)
    assert pool.check([[1]]) == PoolUsage(free=2, held=1, cached=0, total=3)


def test_shrinking_removes_free_blocks_and_refuses_held_ones() -> None:
    pool = pool_of(5)
    pool.alloc(3)
    with pytest.raises(InvariantError, match="held"):
        pool.shrink(2)
    assert pool.n_total == 5
    assert pool.highest_held() == 2
    pool.shrink(3)
    assert (pool.n_total, pool.n_free) == (3, 0)
    pool.release([0, 1, 2])
    assert pool.highest_held() == -1
    pool.shrink(0)
    assert (pool.n_total, pool.n_free) == (0, 0)
    pool.grow(2)
    assert pool.alloc(2) == [0, 1]


def test_holders_move_to_free_blocks_and_nothing_else_moves() -> None:
    pool = BlockPool()
    pool.grow(6)
    held = pool.alloc(4)
    pool.retain([3])
    pool.release([0, 1])
    assert pool.lowest_free(3) == [0, 1, 4]
    pool.relocate({3: 0, 2: 1})
    assert [pool.references(block) for block in range(6)] == [2, 1, 0, 0, 0, 0]
    pool.check([[0, 1], [0]])
    for moves in ({2: 3}, {0: 1}, {0: 4, 1: 4}, {0: 9}):
        with pytest.raises(InvariantError):
            pool.relocate(moves)
    pool.check([[0, 1], [0]])
    assert pool.alloc(4) == [2, 3, 4, 5]
    assert held == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("live", "cached"),
    [([], []), ([[0, 1], [1]], []), ([[0]], []), ([[0, 1, 2]], []), ([[0, 1, 7]], []), ([[0, -1]], []), ([[0]], [[0]])],
)
def test_check_finds_tables_that_do_not_fit(live: list[list[int]], cached: list[list[int]]) -> None:
    pool = pool_of(3)
    pool.alloc(2)
    pool.check([[0, 1]])
    with pytest.raises(InvariantError):
        pool.check(live, cached)


def test_check_counts_what_checkpoints_alone_keep() -> None:
    pool = pool_of(4)
    pool.alloc(3)
    pool.retain([0])
    assert pool.check([[0, 1]], [[0, 2]]) == PoolUsage(free=1, held=2, cached=1, total=4)


def test_300_random_admissions_shares_forks_and_aborts() -> None:
    rng = random.Random(20)
    pool = pool_of(0)
    tables: list[list[int]] = []
    for _ in range(300):
        verb = rng.choice(["admit", "fork", "append", "finish", "abort", "grow", "shrink"])
        try:
            if verb == "admit":
                tables.append(pool.alloc(rng.randrange(5)))
            elif verb == "append" and tables:
                tables[rng.randrange(len(tables))].extend(pool.alloc(1))
            elif verb == "fork" and tables:
                tables.append(list(rng.choice(tables)))
                pool.retain(tables[-1])
            elif verb in ("finish", "abort") and tables:
                pool.release(tables.pop(rng.randrange(len(tables))))
            elif verb == "grow":
                pool.grow(rng.randrange(4))
            elif verb == "shrink":
                pool.shrink(pool.highest_held() + 1)
        except CapacityError:
            assert pool.n_free < 5
        usage = pool.check(tables)
        assert usage.free + usage.held == usage.total
        assert usage.held == len({block for table in tables for block in table})
