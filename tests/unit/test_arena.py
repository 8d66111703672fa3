"""The bytes: what is written is read, wherever the blocks lie; growth copies nothing, a move copies what it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stratakv.blocks.arena import Arena
from stratakv.blocks.geometry import build_spec, with_block_tokens
from stratakv.errors import InvariantError
from stratakv.plan import BlockTable, ReadPlan, WritePlan
from stratakv.spec import LayerSpec
from stratakv.testing.views import drawn

SPAN = 4
LAYERS = [LayerSpec(0, 2, 8, 4), LayerSpec(1, 3, 5, 16)]


def arena_of(*slabs: int, name: str = "fp32", span: int = SPAN) -> Arena:
    spec = build_spec(LAYERS, k_format=name, v_format=name, block_tokens=span)
    arena = Arena(spec.groups[0], torch.get_default_device())
    for n_blocks in slabs:
        arena.extend(arena.new_slabs(n_blocks, arena.spec))
    return arena


def rows(member: int, n_sequences: int, n_rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    layer = LAYERS[member]
    generator = torch.Generator().manual_seed(seed + member)
    shape = (n_sequences, layer.n_kv_heads, n_rows)
    return drawn(*shape, layer.k_dim, generator=generator), drawn(*shape, layer.v_dim, generator=generator)


def first_rows(member: int, n_rows: int) -> tuple[Tensor, Tensor]:
    keys, values = rows(member, 1, 8)
    return keys[:, :, :n_rows], values[:, :, :n_rows]


def write(arena: Arena, member: int, tables: list[list[int]], row: int, new: tuple[Tensor, Tensor]) -> None:
    span, n_tokens = arena.spec.block_tokens, new[0].shape[2]
    used = [tuple(arena.locate(b) for b in table[row // span : -(-(row + n_tokens) // span)]) for table in tables]
    arena.write(member, WritePlan(n_tokens, row, span, tuple(used), arena.version), *new)


def read(arena: Arena, member: int, tables: list[list[int]], n_rows: int, skip: int = 0) -> tuple[Tensor, Tensor]:
    segments = [s for i, table in enumerate(tables) for s in arena.segments(i, table)]
    blocks = BlockTable(len(tables), tuple(segments))
    plan = ReadPlan(blocks, n_rows, skip, arena.spec.block_tokens, ((skip, n_rows),), arena.version)
    return arena.read(member, plan, torch.float32)


@pytest.mark.parametrize(
    "tables",
    [
        [[0, 1, 2]],
        [[2, 1, 0]],
        [[0, 2, 5], [6, 4, 3]],
        [[3, 4, 5], [0, 1, 2]],
        [[0, 1, 2], [0, 1, 6]],
    ],
)
@pytest.mark.parametrize("slabs", [(7,), (1, 6), (2, 2, 3), (1,) * 7])
@pytest.mark.parametrize("chunks", [[11], [3, 8], [1] * 11, [4, 4, 3]])
def test_rows_are_read_as_written_wherever_blocks_lie(
    tables: list[list[int]], slabs: tuple[int, ...], chunks: list[int]
) -> None:
    arena = arena_of(*slabs)
    n = len(tables)
    shared = n > 1 and tables[0][0] == tables[1][0]
    for member in range(2):
        keys, values = rows(member, n, 11)
        if shared:
            keys[1, :, :8], values[1, :, :8] = keys[0, :, :8], values[0, :, :8]
        for new in torch.arange(11).split(chunks):
            write(arena, member, tables, int(new[0]), (keys[:, :, new], values[:, :, new]))
    for member in range(2):
        keys, values = rows(member, n, 11)
        found_keys, found_values = read(arena, member, tables, 11)
        for b in range(n):
            start = 8 if shared and b else 0
            assert torch.equal(found_keys[b, :, start:], keys[b, :, start:])
            assert torch.equal(found_values[b, :, start:], values[b, :, start:])


@pytest.mark.parametrize("skip", [1, 4, 6])
def test_rows_at_the_start_can_be_left_out(skip: int) -> None:
    arena = arena_of(5)
    keys, values = rows(0, 1, 10)
    write(arena, 0, [[4, 0, 2]], 0, (keys, values))
    found_keys, found_values = read(arena, 0, [[4, 0, 2]], 10 - skip, skip)
    assert torch.equal(found_keys, keys[:, :, skip:])
    assert torch.equal(found_values, values[:, :, skip:])


def test_growth_keeps_what_is_there_and_copies_nothing() -> None:
    arena = arena_of(2)
    keys, values = rows(0, 1, 8)
    write(arena, 0, [[0, 1]], 0, (keys, values))
    addresses = [tensor.data_ptr() for tensor in arena.slabs[0].members]
    before = arena.nbytes
    arena.extend(arena.new_slabs(3, arena.spec))
    assert [tensor.data_ptr() for tensor in arena.slabs[0].members] == addresses
    assert arena.bytes_copied == 0
    assert (arena.n_blocks, arena.nbytes) == (5, before // 2 * 5)
    assert arena.nbytes == 5 * arena.spec.bytes_per_block
    assert torch.equal(read(arena, 0, [[0, 1]], 8)[0], keys)


def test_shrinking_gives_back_whole_slabs_from_the_end() -> None:
    arena = arena_of(2, 3, 1)
    assert arena.shrink(6) == 6
    assert arena.shrink(4) == 5  # block 4 lies in the second slab, which stays
    assert arena.shrink(2) == 2
    assert arena.nbytes == 2 * arena.spec.bytes_per_block
    assert arena.shrink(0) == 0
    assert arena.nbytes == 0


def test_blocks_that_lie_side_by_side_are_one_segment() -> None:
    arena = arena_of(3, 4)
    found = arena.segments(7, [0, 1, 4, 5, 6, 2, 3])
    assert [(s.sequence, s.slab, s.first, s.count, s.at) for s in found] == [
        (7, 0, 0, 2, 0),
        (7, 1, 1, 3, 2),
        (7, 0, 2, 1, 5),
        (7, 1, 0, 1, 6),
    ]


def test_single_blocks_side_by_side_are_read_without_a_copy() -> None:
    arena = arena_of(4, span=16)
    keys, values = rows(0, 3, 10)
    write(arena, 0, [[1], [2], [3]], 0, (keys, values))
    found, _ = read(arena, 0, [[1], [2], [3]], 10)
    assert found.data_ptr() >= arena.slabs[0].members[0].data_ptr()
    assert found.data_ptr() < arena.slabs[0].members[0].data_ptr() + arena.slabs[0].members[0].numel()
    assert torch.equal(found, keys)
    out_of_order, _ = read(arena, 0, [[3], [1]], 10)
    assert torch.equal(out_of_order, keys[[2, 0]])


def test_copied_blocks_hold_all_members() -> None:
    arena = arena_of(1, 2)
    for member in range(2):
        write(arena, member, [[0]], 0, rows(member, 1, 4))
    arena.copy([(0, 2)])
    for member in range(2):
        assert torch.equal(read(arena, member, [[2]], 4)[0], rows(member, 1, 4)[0])
        assert torch.equal(read(arena, member, [[2]], 4)[1], rows(member, 1, 4)[1])


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "fp8", "int8"])
def test_moved_rows_are_the_same_rows(name: str) -> None:
    arena = arena_of(6, name=name)
    moved = [1, 2, 6, 9, 10]
    for member in range(2):
        write(arena, member, [[0, 4, 1]], 0, rows(member, 1, 11))
    arena.move_rows(moved, [0, 4, 1], [5, 2])
    for member in range(2):
        before, after = read(arena, member, [[0, 4, 1]], 11), read(arena, member, [[5, 2]], 5)
        assert torch.equal(after[0], before[0][:, :, moved])
        assert torch.equal(after[1], before[1][:, :, moved])


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_larger_blocks_hold_the_same_rows(name: str) -> None:
    spec = build_spec(LAYERS, k_format=name, v_format=name, block_tokens=SPAN)
    arena = arena_of(2, 1, name=name)
    before = []
    for member in range(2):
        write(arena, member, [[0], [2]], 0, rows(member, 2, 3))
        before.append(tuple(x.clone() for x in read(arena, member, [[0], [2]], 3)))
    larger = with_block_tokens(spec, [10]).groups[0]
    n_bytes = arena.nbytes
    arena.enlarge(larger, arena.enlarged_slabs(larger))
    assert arena.bytes_copied == n_bytes
    assert arena.nbytes == 3 * larger.bytes_per_block
    for member in range(2):
        after = read(arena, member, [[0], [2]], 3)
        assert torch.equal(after[0], before[member][0])
        assert torch.equal(after[1], before[member][1])


def test_a_dump_holds_no_stale_row_and_is_loaded_again() -> None:
    arena, other = arena_of(4), arena_of(2, 2)
    for member in range(2):
        write(arena, member, [[2, 0]], 0, rows(member, 1, 8))
    dumped = arena.dump([2, 0], 6)
    fresh = arena_of(2)
    for member in range(2):
        write(fresh, member, [[0, 1]], 0, first_rows(member, 6))
    for mine, expected in zip(dumped, fresh.dump([0, 1], 6), strict=True):
        assert torch.equal(mine, expected)
    other.load([1, 2], dumped)
    for member in range(2):
        assert torch.equal(read(other, member, [[1, 2]], 6)[0], rows(member, 1, 8)[0][:, :, :6])
    with pytest.raises(InvariantError, match="do not fill"):
        other.load([1], dumped)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "fp8", "int8"])
def test_poisoned_blocks_read_as_nan_and_their_neighbours_do_not(name: str) -> None:
    arena = arena_of(3, name=name)
    arena.poison([1])
    for member in range(2):
        for part in read(arena, member, [[0, 1, 2]], 12):
            assert part.isnan().all(dim=3).all(dim=1)[0].tolist() == [4 <= r < 8 for r in range(12)]
