"""Ctrl-C at any time: a verb is done or it did not happen, and the cache goes on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from stratakv.blocks import interrupts
from stratakv.blocks.arena import Arena
from stratakv.blocks.interrupts import uninterrupted
from stratakv.blocks.memory import Memory
from stratakv.blocks.pool import BlockPool
from stratakv.testing.running import assert_logits_equal, fed_logits, random_ids, uncached_logits
from stratakv.testing.tiny import tiny_llama
from stratakv.testing.ways import LAYOUTS, model_for, small_cache


@pytest.fixture(autouse=True)
def as_in_front() -> Iterator[None]:
    """The handler of Ctrl-C that a process has which was not started in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """Let Ctrl-C come with the next call of a method, when it has done its work."""
    done = getattr(owner, name)

    def interrupted(*args: Any) -> Any:
        patch.setattr(owner, name, done)
        found = done(*args)
        os.kill(os.getpid(), signal.SIGINT)
        return found

    patch.setattr(owner, name, interrupted)


VERBS: dict[str, tuple[int, Any]] = {  # and the tokens that are left
    "truncate": (5, lambda cache, mark: cache.truncate(5)),
    "truncate to nothing": (0, lambda cache, mark: cache.truncate(0)),
    "reset": (0, lambda cache, mark: cache.reset()),
    "rollback": (8, lambda cache, mark: cache.rollback(mark)),
    "release": (12, lambda cache, mark: mark.release()),
    "fork": (12, lambda cache, mark: cache.fork()),
    "select": (12, lambda cache, mark: cache.batch_select_indices(torch.tensor([1, 1]))),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("point", [(Memory, "_shrink"), (BlockPool, "retain"), (BlockPool, "release")])
def test_an_interrupt_waits_until_a_verb_is_done(
    verb: str, point: tuple[type, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_for("gathered", tiny_llama)
    ids = random_ids(1, 20, seed=73).expand(2, -1)
    cache = small_cache(model)
    fed_logits(model, cache, ids[:, :8])
    mark = cache.checkpoint()
    fed_logits(model, cache, ids[:, 8:12])
    n_left, run = VERBS[verb]
    with monkeypatch.context() as patch:
        interrupting(patch, *point)
        try:
            run(cache, mark)
        except KeyboardInterrupt:
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    cache.check()
    assert cache.seen_tokens == n_left
    assert_logits_equal(fed_logits(model, cache, ids[:, n_left:]), uncached_logits(model, ids)[:, n_left:])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("point", [(Memory, "_reserve"), (Memory, "_compact"), (Memory, "_grow"), (Arena, "extend")])
@pytest.mark.parametrize("takes_back", [True, False])
def test_a_forward_that_is_interrupted_can_be_repeated(
    layout: str, point: tuple[type, str], takes_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_for("gathered", tiny_llama)
    ids = random_ids(1, 90, seed=71)
    cache = small_cache(model, layout, **({"capacity": 90} if layout == "contiguous" else {}))
    fed_logits(model, cache, ids[:, :60])
    fork = cache.fork()
    interrupting(monkeypatch, *point)
    with pytest.raises(KeyboardInterrupt):
        fed_logits(model, cache, ids[:, 60:])
    if takes_back:  # else the same tokens go into the room that was made for them, since no layer has written yet
        cache.truncate(60)
    cache.check()
    for each in (cache, fork):
        expected = uncached_logits(model, ids)[:, 60:]
        assert_logits_equal(fed_logits(model, each, ids[:, 60:]), expected)


def test_other_signals_that_raise_do_not_take_the_interrupt_away() -> None:
    def expire(*_: Any) -> None:
        raise TimeoutError

    held = uninterrupted(lambda: None)
    before = signal.signal(signal.SIGALRM, expire)
    try:
        for _ in range(300):
            with pytest.raises(TimeoutError):  # the alarm may come at once
                signal.setitimer(signal.ITIMER_REAL, 0.0003)
                while True:
                    held()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    held()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_interrupts_of_one_verb_are_raised_once() -> None:
    def thrice() -> None:
        for _ in range(3):
            interrupt()

    with pytest.raises(KeyboardInterrupt):
        uninterrupted(thrice)()
    assert uninterrupted(lambda: "undisturbed")() == "undisturbed"
    assert not interrupts._came


def test_a_handler_that_was_set_meanwhile_stays() -> None:
    came: list[int] = []
    uninterrupted(lambda: signal.signal(signal.SIGINT, lambda number, _: came.append(number)))()
    interrupt()
    assert came == [signal.SIGINT]


def test_an_interrupt_is_not_lost_where_the_handler_could_not_be_put_back() -> None:
    taken = uninterrupted(lambda: signal.getsignal(signal.SIGINT))()
    signal.signal(signal.SIGINT, taken)  # as left by signals that raise, or by who takes it for the process's own
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    with pytest.raises(KeyboardInterrupt):
        uninterrupted(interrupt)()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_comes_as_a_verb_begins_or_ends_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Just before the handler is exchanged or just after, at either end."""
    own = signal.signal
    for moment in range(4):
        calls: list[int] = []

        def exchange(number: int, handler: Any, calls: list[int] = calls, moment: int = moment) -> Any:
            calls.append(number)
            if 2 * len(calls) - 2 == moment:
                interrupt()
            before = own(number, handler)
            if 2 * len(calls) - 1 == moment:
                interrupt()
            return before

        with monkeypatch.context() as patch:
            patch.setattr(signal, "signal", exchange)
            with pytest.raises(KeyboardInterrupt):
                uninterrupted(lambda: None)()
        assert uninterrupted(lambda: "undisturbed")() == "undisturbed"


def test_a_handler_may_use_verbs_itself() -> None:
    came: list[int] = []

    def handle(number: int, _: Any) -> None:
        came.append(number)
        if len(came) == 1:
            uninterrupted(interrupt)()

    signal.signal(signal.SIGINT, handle)
    uninterrupted(interrupt)()
    assert len(came) == 2
    taken = uninterrupted(lambda: signal.getsignal(signal.SIGINT))()
    signal.signal(signal.SIGINT, taken)
    came.clear()
    interrupt()
    assert len(came) == 2


def test_a_verb_within_one_that_set_another_handler_drops_nothing() -> None:
    def outer() -> None:
        interrupt()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        uninterrupted(lambda: None)()

    with pytest.raises(KeyboardInterrupt):
        uninterrupted(outer)()
