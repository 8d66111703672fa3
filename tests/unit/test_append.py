"""Rows that kernels write are, byte for byte, those that the codecs write."""

from __future__ import annotations

import pytest
import torch
from attention_checks import threads
from torch import Tensor

from stratakv.blocks.append import Appender
from stratakv.blocks.arena import Arena
from stratakv.blocks.batch import SequenceBatch
from stratakv.blocks.geometry import build_spec, rows_coded_together
from stratakv.blocks.memory import Memory
from stratakv.extension import instruction_sets, is_built
from stratakv.plan import WritePlan
from stratakv.spec import LayerSpec
from stratakv.testing.views import drawn

pytestmark = pytest.mark.skipif(not is_built(), reason="installed without the extension, on purpose or for want of g++")

every_isa = pytest.mark.parametrize("isa", instruction_sets())
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
FORMATS = ("fp32", "bf16", "fp16", "fp8", "int8", "int4", "int2")
every_format = pytest.mark.parametrize("name", FORMATS)


def pages(
    appender: Appender | None, name: str, keys: Tensor, values: Tensor, row: int, *, block_tokens: int = 64
) -> list[Tensor]:
    """The bytes of an arena whose rows from `row` on were written: those that are coded in groups from row 0 on."""
    n_sequences, n_heads, n_tokens, k_dim = keys.shape
    layer = LayerSpec(0, n_heads, k_dim, values.shape[3])
    spec = build_spec([layer], k_format=name, v_format=name, block_tokens=block_tokens, comes_once=True).groups[0]
    arena = Arena(spec, torch.device("cpu"))
    arena.appender = appender
    n_blocks = spec.blocks_for(row + n_tokens)
    arena.extend(arena.new_slabs(n_blocks * n_sequences, spec))
    for slab in arena.slabs:
        slab.members[0].fill_(0x33)
    blocks = torch.randperm(n_blocks * n_sequences, generator=torch.Generator().manual_seed(row)).tolist()
    tables = tuple(tuple(arena.locate(block) for block in blocks[s::n_sequences]) for s in range(n_sequences))
    arena.write(0, WritePlan(n_tokens, row, block_tokens, tables, arena.version), keys, values)
    if rows_coded_together(spec) > 1:
        arena.write(0, WritePlan(n_tokens, 0, block_tokens, tables, arena.version), keys, values, in_groups=True)
    return [slab.members[0] for slab in arena.slabs]


def assert_same(isa: str, name: str, keys: Tensor, values: Tensor, row: int = 0, *, block_tokens: int = 64) -> None:
    by_codecs = pages(None, name, keys, values, row, block_tokens=block_tokens)
    by_kernels = pages(Appender(isa), name, keys, values, row, block_tokens=block_tokens)
    for expected, found in zip(by_codecs, by_kernels, strict=True):
        assert torch.equal(expected, found)


def rows(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of sizes from 1e-3 to 1e3, some channels larger than others."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 3, 7)[torch.randint(7, (*shape[:-1], 1), generator=generator)]
    return (drawn(*shape, generator=generator) * sizes * drawn(shape[-1], generator=generator).exp()).to(dtype)


@every_isa
@every_format
@every_dtype
@pytest.mark.parametrize("block_tokens", [1, 4, 48, 64, 160])
def test_blocks_and_places(isa: str, name: str, dtype: torch.dtype, block_tokens: int) -> None:
    for row, n_tokens in ((0, 1), (3, 1), (block_tokens - 1, 130), (2, 64)):
        keys, values = (rows(2, 3, n_tokens, 64, dtype=dtype, seed=row + i) for i in range(2))
        assert_same(isa, name, keys, values, row, block_tokens=block_tokens)


@every_isa
@every_format
@pytest.mark.parametrize("dims", [(1, 1), (5, 3), (24, 20), (80, 96), (128, 130), (192, 257), (300, 1024)])
def test_head_dims(isa: str, name: str, dims: tuple[int, int]) -> None:
    keys, values = (rows(1, 2, 70, dim, dtype=torch.float32, seed=dim) for dim in dims)
    assert_same(isa, name, keys, values)


@every_isa
@every_format
@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-30, 1.0, 60000.0, 1e30, 3e38])
def test_sizes_of_numbers(isa: str, name: str, size: float) -> None:
    keys, values = (
        drawn(1, 2, 65, 48, generator=torch.Generator().manual_seed(i)).clamp(-1, 1) * size for i in range(2)
    )
    keys[0, 0, 3], values[0, 1, 7] = size, -size  # all alike
    keys[..., 5], values[..., 9] = 0.0, size
    keys[0, 1], values[0, 0, 5:9] = 0.0, 0.0
    assert_same(isa, name, keys, values)


@every_isa
@pytest.mark.parametrize("name", FORMATS[3:])
def test_what_is_no_number(isa: str, name: str) -> None:
    keys, values = (drawn(1, 3, 64, 40, generator=torch.Generator().manual_seed(i)) for i in range(2))
    for i, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        keys[0, i, 10 + i, 7 + i] = values[0, i, 20 + i, 3 + i] = bad
    expected, found = (pages(by, name, keys, values, 0)[0] for by in (None, Appender(isa)))
    is_other = (expected != found).view(-1, 2).any(1)  # there are several NaN in bf16
    for each in (expected, found):
        assert each.view(torch.bfloat16)[0][is_other].isnan().all()


@every_isa
@every_format
def test_rows_in_any_layout_by_several_threads(isa: str, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = drawn(2, 300, 4, 64, generator=generator).transpose(1, 2)
    values = drawn(2, 4, 64, 300, generator=generator).transpose(2, 3)
    shared = drawn(1, 1, 300, 64, generator=generator).expand(2, 4, 300, 64)
    negated = torch._neg_view(keys)
    for n_threads in (1, 2, 5):
        with threads(n_threads):
            for first, second in ((keys, values), (values, shared), (negated, keys)):
                assert_same(isa, name, first, second, 5)


@every_format
def test_what_kernels_do_not_take_is_written_all_the_same(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (drawn(1, 2, 64, 32, generator=generator) for _ in range(2))
    for first, second in ((keys.double(), values.double()), (keys, values.bfloat16())):
        assert_same(instruction_sets()[0], name, first, second)


def test_a_saved_view_knows_that_pages_were_written() -> None:
    keys = drawn(1, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    written = pages(Appender(), "fp32", keys, keys, 0)[0]
    before = written._version
    layer = LayerSpec(0, 1, 8, 8)
    arena = Arena(build_spec([layer], k_format="fp32", v_format="fp32").groups[0], torch.device("cpu"))
    arena.extend(arena.new_slabs(1, arena.spec))
    first = arena.slabs[0].members[0]._version
    arena.write(0, WritePlan(4, 0, 64, ((arena.locate(0),),), arena.version), keys, keys)
    assert arena.slabs[0].members[0]._version > first
    assert written._version == before


@every_format
@pytest.mark.parametrize("block_tokens", [1, 2, 64])
def test_a_cache_holds_the_same_rows_by_kernels_and_by_codecs(name: str, block_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (drawn(2, 2, 200, 32, generator=generator) for _ in range(2))
    found = []
    for has_kernels in (True, False):
        layer = LayerSpec(0, 2, 32, 32)
        spec = build_spec([layer], k_format=name, v_format=name, block_tokens=block_tokens)
        batch = SequenceBatch(Memory(spec, device=torch.device("cpu")))
        for arena in batch.memory.arenas:
            arena.appender = Appender() if has_kernels else None
        for start, stop in ((0, 150), (150, 151), (151, 200)):
            batch.begin(2, stop - start)
            batch.write(0, keys[:, :, start:stop], values[:, :, start:stop])
        found.append(batch.view(0).gather(torch.float32))
    for by_kernels, by_codecs in zip(*found, strict=True):
        assert torch.equal(by_kernels, by_codecs)
