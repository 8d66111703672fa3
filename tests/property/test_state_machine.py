"""Any order of verbs over shared blocks: the books add up, and each sequence holds exactly what a plain list says."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from stratakv.blocks.arena import Arena
from stratakv.blocks.batch import SequenceBatch
from stratakv.blocks.checkpoint import Checkpoint
from stratakv.blocks.geometry import build_spec
from stratakv.blocks.memory import Memory
from stratakv.blocks.view import KVView
from stratakv.errors import CapacityError, ConfigurationError, StateError, UnsupportedError
from stratakv.plan import KeepPlan
from stratakv.policies import RetentionPolicy, Window
from stratakv.spec import LayerSpec, Retention
from stratakv.testing.runs import positions, runs_of

LAYERS = (LayerSpec(0, 2, 3, 2), LayerSpec(1, 2, 2, 5, window=3), LayerSpec(2, 2, 4, 4))
CAPACITY = 24
MOST_TOKENS = 150
UNDO = ("abort", "truncate")
FALLIBLE = ("copy", "move_rows", "relocate", "write", "_new_members", "_zeros")
FAILS_AT = st.none() | st.integers(0, 6)

SETUPS: dict[str, tuple[str, str, RetentionPolicy | None]] = {
    "paged": ("paged", "fp32", None),
    "window for each head, sinks": ("paged", "fp32", Window((3, 6), sinks=2)),
    "window": ("paged", "fp32", Window(5)),
    "contiguous": ("contiguous", "fp32", None),
    "growing": ("growing", "fp32", None),
    "int8": ("paged", "int8", None),
    "int4": ("paged", "int4", None),
    "int4, window": ("paged", "int4", Window(30, sinks=2)),
    "int4, contiguous": ("contiguous", "int4", None),
}
RESIDUAL = 8
NEAR = {"fp32": 0.0, "int8": 0.03, "int4": 0.25}
"""How far numbers from -1 to 1 may be from what was stored: half of two steps, where rows were coded a second time."""


@dataclass
class Expected:
    """What a batch must hold: the token at each position of each sequence, and the positions never dropped by hand."""

    tokens: list[list[int]] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)
    floor: int = 0

    @property
    def seen(self) -> int:
        return len(self.tokens[0]) if self.tokens else 0

    def visible(self, query: int, retention: Retention) -> set[int]:
        """Positions before `query` that it sees."""
        first = 0 if retention.window is None else query - retention.window + 1
        return {p for p in range(query) if p >= first or p < retention.sinks}


@dataclass
class Live:
    """A batch of the library beside the model of it."""

    batch: SequenceBatch
    expected: Expected


def rows_of(tokens: list[list[int]], layer: LayerSpec, *, is_key: bool) -> Tensor:
    """The rows `[n_sequences, n_kv_heads, n_tokens, dim]` that stand for `tokens` in one layer: no two are alike.

    Numbers from -1 to 1, as evenly as chance would have it.
    """
    ids = torch.tensor(tokens)[:, None, :, None]
    heads = torch.arange(layer.n_kv_heads)[None, :, None, None]
    dims = torch.arange(layer.k_dim if is_key else layer.v_dim)[None, None, None, :]
    numbers = ids * 128 + layer.index * 32 + heads * 8 + dims + (not is_key) * 2**20
    mixed = (numbers * 2654435761 % 2**32) * 2246822519 % 2**32
    return mixed.float() / 2**31 - 1


@contextmanager
def failing(at: int | None) -> Iterator[None]:
    """Let the call numbered `at` of those that touch bytes find no memory."""
    calls = iter(range(1000000))

    def watched(verb: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            if next(calls) == at:
                raise MemoryError
            return verb(*args, **options)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in FALLIBLE:
            patch.setattr(Arena, name, watched(getattr(Arena, name)))
        yield


class CacheMachine(RuleBasedStateMachine):
    """Batches and checkpoints over one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.live: list[Live] = []
        self.marks: list[tuple[Checkpoint, Expected]] = []
        self.next_token = 1

    @initialize(name=st.sampled_from(sorted(SETUPS)), block_tokens=st.sampled_from([1, 2, 4]), budget=st.booleans())
    def start(self, name: str, block_tokens: int, budget: bool) -> None:
        layout, self.format, self.policy = SETUPS[name]
        capacity = CAPACITY if layout == "contiguous" else None
        spec = build_spec(
            LAYERS,
            k_format=self.format,
            v_format=self.format,
            residual=None if self.format == "fp32" else capacity or RESIDUAL,
            layout=layout,
            block_tokens=block_tokens,
            capacity=capacity,
            policy=self.policy,
        )
        max_bytes = None
        if budget:
            max_bytes = 5 * sum(g.bytes_per_block * max(1, 12 // g.block_tokens) for g in spec.groups)
        self.memory = Memory(spec, device=torch.get_default_device(), max_bytes=max_bytes, poison=True)
        self.live = [Live(SequenceBatch(self.memory, self.policy), Expected())]

    def pick(self, data: st.DataObject) -> Live:
        return self.live[data.draw(st.integers(0, len(self.live) - 1))]

    # Steps

    @rule(
        data=st.data(),
        n_new=st.integers(1, 6) | st.integers(7, 40),
        n_sequences=st.integers(1, 3),
        fails_at=FAILS_AT,
    )
    def write(self, data: st.DataObject, n_new: int, n_sequences: int, fails_at: int | None) -> None:
        live = self.pick(data)
        tokens = self.new_tokens(live, n_sequences, n_new)
        if live.expected.seen + n_new > MOST_TOKENS:
            return
        try:
            with failing(fails_at):
                live.batch.begin(len(tokens), n_new)
                views = [self.write_layer(live, layer, tokens) for layer in LAYERS]
        except (CapacityError, MemoryError):
            assert fails_at is not None or self.memory.max_bytes or self.memory.spec.capacity
            if live.batch.open_step:
                live.batch.abort()
            return
        before = live.expected.seen
        live.expected.kept.update(range(before, before + n_new))
        live.expected.tokens = [a + b for a, b in zip(live.expected.tokens or [[]] * len(tokens), tokens, strict=True)]
        for view in views:
            self.check_view(live, view, n_new)

    @rule(data=st.data(), n_new=st.integers(1, 5), n_written=st.integers(0, 2), undo=st.sampled_from(UNDO))
    def stop_half_way(self, data: st.DataObject, n_new: int, n_written: int, undo: str) -> None:
        live = self.pick(data)
        tokens = self.new_tokens(live, 2, n_new)
        try:
            live.batch.begin(len(tokens), n_new)
        except CapacityError:
            return
        for layer in LAYERS[:n_written]:
            self.write_layer(live, layer, tokens)
        for refused in (live.batch.fork, live.batch.checkpoint, lambda: live.batch.begin(len(tokens), 1)):
            with pytest.raises(StateError):
                refused()
        if undo == "abort":
            live.batch.abort()
        else:
            live.batch.truncate(live.expected.seen)
        if not live.expected.tokens:
            live.batch.reset()

    # Going back

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        live = self.pick(data)
        n = data.draw(st.integers(0, live.expected.seen))
        try:
            live.batch.truncate(n)
        except StateError:
            assert n < live.expected.floor or any(g.retention.window for g in self.memory.spec.groups)
            assert 0 < n < live.expected.seen
            return
        assert n == 0 or n >= min(live.expected.floor, live.expected.seen)
        if n == 0:
            live.expected = Expected()
            return
        live.expected.tokens = [tokens[:n] for tokens in live.expected.tokens]
        live.expected.kept = {p for p in live.expected.kept if p < n}

    @rule(data=st.data())
    def checkpoint(self, data: st.DataObject) -> None:
        if len(self.marks) >= 3:
            return
        live = self.pick(data)
        self.marks.append((live.batch.checkpoint(), copy.deepcopy(live.expected)))

    @precondition(lambda self: self.marks)
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        live = self.pick(data)
        mark, expected = self.marks[data.draw(st.integers(0, len(self.marks) - 1))]
        live.batch.rollback(mark)
        live.expected = copy.deepcopy(expected)

    @precondition(lambda self: self.marks)
    @rule(data=st.data(), how=st.sampled_from(["release", "forget"]))
    def drop_checkpoint(self, data: st.DataObject, how: str) -> None:
        mark, _ = self.marks.pop(data.draw(st.integers(0, len(self.marks) - 1)))
        if how == "release":
            mark.release()
            with pytest.raises(StateError):
                self.live[0].batch.rollback(mark)

    # The batch

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        if len(self.live) >= 4:
            return
        live = self.pick(data)
        self.live.append(Live(live.batch.fork(), copy.deepcopy(live.expected)))

    @precondition(lambda self: len(self.live) > 1)
    @rule(data=st.data(), how=st.sampled_from(["reset", "forget"]))
    def drop_fork(self, data: st.DataObject, how: str) -> None:
        live = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        if how == "reset":
            live.batch.reset()
        del live
        gc.collect(0)

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        live = self.pick(data)
        if not live.expected.tokens:
            return
        n = len(live.expected.tokens)
        indices = data.draw(st.lists(st.integers(-n, n - 1), min_size=1, max_size=4))
        live.batch.select(indices)
        live.expected.tokens = [list(live.expected.tokens[i]) for i in indices]

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        live = self.pick(data)
        live.batch.reset()
        live.expected = Expected()

    # Rows that go

    @rule(data=st.data(), fails_at=FAILS_AT)
    def compact(self, data: st.DataObject, fails_at: int | None) -> None:
        live = self.pick(data)
        if not live.expected.tokens:
            return
        tables = self.compactable(live)
        stored = set(live.expected.kept).intersection(*tables)
        some = data.draw(st.sets(st.sampled_from(sorted(stored)), max_size=8)) if stored else set()
        keep = some if data.draw(st.booleans()) else stored - some  # few rows, or all but a few
        try:
            with failing(fails_at):
                live.batch.compact(KeepPlan(runs_of(keep), live.expected.seen))
        except (CapacityError, MemoryError):
            assert fails_at is not None or self.memory.max_bytes
            if self.compactable(live) == tables:
                return
            # It was done, and then failed to give memory back.
        except UnsupportedError:  # rows that are coded together would part
            assert self.format == "int4"
            assert self.compactable(live) == tables
            return
        live.expected.kept = keep
        if any(table != keep for table in tables):  # what loses no row can be cut back as before
            live.expected.floor = live.expected.seen

    def compactable(self, live: Live) -> list[set[int]]:
        """The positions in each group that has no window of the model's own."""
        groups = [g for g, each in enumerate(self.memory.spec.groups) if each.imposed or each.retention.window is None]
        return [set(positions(live.batch.sequences[0].tables[g].runs)) for g in groups]

    @rule(data=st.data())
    def ask_for_what_is_not_there(self, data: st.DataObject) -> None:
        live = self.pick(data)
        with pytest.raises(ConfigurationError):
            live.batch.select([0, len(live.expected.tokens)])
        if live.expected.tokens:
            with pytest.raises(ConfigurationError):
                live.batch.compact(KeepPlan(((live.expected.seen, 1),), live.expected.seen))

    @rule(data=st.data(), fails_at=FAILS_AT)
    def evict(self, data: st.DataObject, fails_at: int | None) -> None:
        try:
            with failing(fails_at):
                self.pick(data).batch.evict()
        except (CapacityError, MemoryError):
            assert fails_at is not None or self.memory.max_bytes

    @rule(data=st.data(), recording=st.booleans())
    def record(self, data: st.DataObject, recording: bool) -> None:
        self.pick(data).batch.recording = recording

    # What must hold

    @invariant()
    def books_add_up(self) -> None:
        if not hasattr(self, "memory"):
            return
        if not self.live:
            self.live = [Live(SequenceBatch(self.memory, self.policy), Expected())]
        usage = self.memory.check()
        assert usage.blocks.free + usage.blocks.held + usage.blocks.cached == usage.blocks.total
        assert usage.used_bytes <= usage.held_bytes
        assert self.memory.max_bytes is None or usage.held_bytes <= self.memory.max_bytes

    @invariant()
    def rows_are_as_expected(self) -> None:
        for live in self.live:
            assert live.batch.seen_tokens == live.expected.seen
            assert len(live.batch.sequences) == len(live.expected.tokens)
            if live.expected.tokens:
                for layer in LAYERS:
                    self.check_view(live, live.batch.view(layer.index), 0)

    def teardown(self) -> None:
        if not hasattr(self, "memory"):
            return
        for live in self.live:
            live.batch.reset()
        for mark, _ in self.marks:
            mark.release()
        usage = self.memory.check()
        assert (usage.blocks.held, usage.blocks.cached, usage.used_bytes) == (0, 0, 0)
        self.memory.settle()
        assert self.memory.nbytes == 0

    def new_tokens(self, live: Live, n_sequences: int, n_new: int) -> list[list[int]]:
        n = len(live.expected.tokens) or n_sequences
        first = self.next_token
        self.next_token += n * n_new
        return [list(range(first + i * n_new, first + (i + 1) * n_new)) for i in range(n)]

    def write_layer(self, live: Live, layer: LayerSpec, tokens: list[list[int]]) -> KVView:
        return live.batch.write(layer.index, rows_of(tokens, layer, is_key=True), rows_of(tokens, layer, is_key=False))

    def check_view(self, live: Live, view: KVView, n_new: int) -> None:
        """Rows are those of the tokens at their positions, and no row is missing that a query sees."""
        expected, layer = live.expected, LAYERS[view.layer]
        assert sorted(head for part in view.parts for head in part.heads) == list(range(layer.n_kv_heads))
        for part in view.parts:
            at = part.positions().tolist()
            retention = part.arena.spec.retention
            own = retention.window is not None and not part.arena.spec.imposed
            kept = set(range(expected.seen)) if own else expected.kept
            for query in range(expected.seen - n_new, expected.seen + 1):
                assert (expected.visible(query, retention) & kept) <= set(at)
            assert set(at) <= kept
            if retention.window is None:
                assert set(at) == kept
            assert at == sorted(at)
            tokens = [[row[p] for p in at] for row in expected.tokens]
            keys, values = part.read(torch.float32)
            heads = list(part.heads)
            for found, is_key in ((keys, True), (values, False)):
                right = rows_of(tokens, layer, is_key=is_key)[:, heads].reshape(found.shape)
                assert torch.isfinite(found).all()
                assert not ((found - right).abs() > NEAR[self.format]).any()


QUIET: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "phases": [Phase.generate],  # a failing run is short enough to read, and shrinking it takes minutes
    "suppress_health_check": list(HealthCheck),
}


def test_any_order_of_verbs() -> None:
    run_state_machine_as_test(
        CacheMachine, settings=settings(max_examples=200, stateful_step_count=40, derandomize=True, **QUIET)
    )


@pytest.mark.soak
def test_any_order_of_verbs_for_long() -> None:
    run_state_machine_as_test(CacheMachine, settings=settings(max_examples=3000, stateful_step_count=80, **QUIET))
