"""Caches filled in inference mode and managed outside of it: every verb works, and none breaks half way."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from stratakv.blocks.batch import SequenceBatch
from stratakv.blocks.geometry import build_spec
from stratakv.blocks.memory import Memory
from stratakv.blocks.view import KVView
from stratakv.plan import KeepPlan
from stratakv.policies import Window
from stratakv.spec import LayerSpec
from stratakv.testing.views import drawn

LAYER = LayerSpec(0, 2, 8, 8)
SEEN = 301


def filled(policy: Window | None = None) -> tuple[SequenceBatch, Tensor]:
    """Two sequences of SEEN tokens, whose rows were written in inference mode, and the keys of them all."""
    spec = build_spec([LAYER], k_format="fp32", v_format="fp32", block_tokens=4, policy=policy)
    batch = SequenceBatch(Memory(spec, device=torch.get_default_device(), poison=True), policy)
    rows = drawn(2, 2, SEEN, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        add(batch, rows)
    return batch, rows


def add(batch: SequenceBatch, rows: Tensor) -> KVView:
    batch.begin(2, rows.shape[2])
    return batch.write(0, rows, -rows)


def fork_and_add(batch: SequenceBatch) -> None:
    add(batch.fork(), torch.zeros(2, 2, 3, 8))


VERBS: dict[str, Callable[[SequenceBatch], None]] = {
    "evict": lambda batch: batch.evict(),
    "truncate": lambda batch: batch.truncate(37),
    "compact to whole blocks": lambda batch: batch.compact(KeepPlan(((0, 4), (SEEN - 13, 13)), SEEN)),
    "compact to other rows": lambda batch: batch.compact(KeepPlan(((3, 6), (50, 3), (SEEN - 12, 12)), SEEN)),
    "select": lambda batch: batch.select([1, 1]),
    "fork": fork_and_add,
    "reset": lambda batch: batch.reset(),
}


POLICIES = {"all": None, "window": Window(12), "sinks": Window(12, sinks=3)}
# What has left a window cannot come back: no long truncation there.
CASES = [(verb, name) for verb in VERBS for name in POLICIES if verb != "truncate" or name == "all"]


@pytest.mark.parametrize(("verb", "name"), CASES)
def test_verbs_work_outside_inference_mode(verb: str, name: str) -> None:
    policy = POLICIES[name]
    batch, rows = filled(policy)
    if verb.startswith("compact") and policy is not None:
        batch.recording = True
    VERBS[verb](batch)
    batch.memory.check()
    held = batch.seen_tokens
    expected = torch.cat([rows[[1, 1]] if verb == "select" else rows, torch.ones(2, 2, 2, 8)], dim=2)
    view = add(batch, torch.ones(2, 2, 2, 8))
    positions = view.parts[0].positions()
    places = torch.where(positions < held, positions, positions - held + SEEN)
    assert len(positions) == {"reset": 2, "truncate": 39}.get(verb, len(positions))
    assert len(positions) >= 2 + (11 if held else 0)
    assert torch.equal(view.gather(torch.float32)[0], expected[:, :, places])
    batch.memory.check()


def test_rows_that_cannot_move_leave_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, rows = filled()
    arena = batch.memory.arenas[0]

    def fail(*_: object) -> None:
        raise MemoryError

    for name in ("move_rows", "copy"):
        with monkeypatch.context() as patch:
            patch.setattr(arena, name, fail)
            with pytest.raises(MemoryError):
                batch.compact(
                    KeepPlan(((3, 6), (SEEN - 10, 10)), SEEN)
                    if name == "move_rows"
                    else KeepPlan(((SEEN - 9, 9),), SEEN)
                )
        batch.memory.check()
        if name == "move_rows":
            assert torch.equal(batch.view(0).gather(torch.float32)[0], rows)


def test_a_first_step_that_is_undone_leaves_no_sequences() -> None:
    spec = build_spec([LAYER], k_format="fp32", v_format="fp32")
    batch = SequenceBatch(Memory(spec, device=torch.get_default_device()))
    batch.begin(2, 5)
    batch.abort()
    assert not batch.sequences
    batch.begin(3, 5)
    batch.memory.check()


@pytest.mark.parametrize("nth", [1, 2])
def test_a_copy_that_fails_leaves_no_step_and_no_block(nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two sequences, whose last blocks a fork shares, the copy of either fails."""
    batch, rows = filled()
    twin = batch.fork()
    arena, n_copies = batch.memory.arenas[0], 0
    real = arena.copy

    def copy(pairs: Iterable[tuple[int, int]]) -> None:
        nonlocal n_copies
        n_copies += 1
        if n_copies == nth:
            raise KeyboardInterrupt
        real(pairs)

    with monkeypatch.context() as patch:
        patch.setattr(arena, "copy", copy)
        with pytest.raises(KeyboardInterrupt):
            batch.begin(2, 1)
    batch.memory.check()
    for each in (batch, twin):
        found = add(each, torch.ones(2, 2, 1, 8)).gather(torch.float32)[0]
        assert torch.equal(found, torch.cat([rows, torch.ones(2, 2, 1, 8)], dim=2))
    batch.memory.check()


def test_of_sequences_that_share_a_block_the_last_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, rows = filled()
    batch.select([0, 0, 0])
    copied: list[tuple[int, int]] = []
    arena = batch.memory.arenas[0]
    real = arena.copy

    def copy(pairs: Iterable[tuple[int, int]]) -> None:
        copied.extend(pairs)
        real(pairs)

    monkeypatch.setattr(arena, "copy", copy)
    batch.begin(3, 1)
    view = batch.write(0, torch.ones(3, 2, 1, 8), torch.ones(3, 2, 1, 8))
    assert len(copied) == 2
    assert torch.equal(view.gather(torch.float32)[0][:, :, :SEEN], rows[[0, 0, 0]])
    batch.memory.check()
