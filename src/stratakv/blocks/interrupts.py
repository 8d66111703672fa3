"""Ctrl-C where several things change together: held until all of them have."""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

_came: list[tuple[int, FrameType | None]] = []  # the first while the outermost verb runs
_handler: Callable[[int, FrameType | None], Any] = signal.default_int_handler  # in whose place `_remember` is


def uninterrupted(verb: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let an interrupt that arrives while `verb` runs be raised when it has returned; several are one.

    Python interrupts the main thread only, so that other threads have nothing to hold. What other signals' handlers
    raise is not held, and handlers that were set outside of Python are not seen.
    """

    @functools.wraps(verb)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        is_outermost = _hold()
        try:
            return verb(*args, **kwargs)
        finally:
            if is_outermost:
                _deliver()

    return run


def _hold() -> bool:
    """Put `_remember` in place. False where interrupts are held further out, or cannot be."""
    global _handler  # noqa: PLW0603  (signals are the process's, too)
    if threading.get_ident() != threading.main_thread().ident:
        return False
    handler = signal.getsignal(signal.SIGINT)
    if handler is _remember and _is_in_verb(sys._getframe(2)):
        return False
    if _came and not _is_in_verb(sys._getframe(2)):  # while it was delivered, another one was, too
        _came.clear()
    if handler is _remember:
        return True
    if callable(handler):
        _handler = handler
        try:
            signal.signal(signal.SIGINT, _remember)
        except ValueError:  # the interpreter's main thread is not the one that `threading` takes for it
            return False
        return True
    return False  # nothing of Python's would be raised


def _deliver() -> None:
    try:
        if signal.getsignal(signal.SIGINT) is _remember:  # and not one that was set meanwhile
            try:
                signal.signal(signal.SIGINT, _handler)
            except BaseException:  # of another signal's handler, which runs first
                signal.signal(signal.SIGINT, _handler)
                raise
    finally:
        if _came:
            first = _came[0]
            _came.clear()
            _handler(*first)


def _remember(number: int, frame: FrameType | None) -> None:
    """Hold an interrupt, or pass it on where no verb runs.

    Then handlers of other signals raised whenever it was put back, or somebody took it for the process's own.
    """
    if not _is_in_verb(frame):
        _handler(number, frame)
    elif not _came:
        _came.append((number, frame))


def _is_in_verb(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals is globals() and frame.f_code is not _remember.__code__:
            return True
        frame = frame.f_back
    return False
