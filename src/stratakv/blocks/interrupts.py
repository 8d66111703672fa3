"""Ctrl-C where several things change together: held until all of them have."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

_came: list[tuple[int, FrameType | None]] = []


def uninterrupted(verb: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let an interrupt that arrives while `verb` runs be raised when it has returned.

    Python interrupts the main thread only, so that other threads have nothing to hold. What other signals' handlers
    raise is not held, and handlers that were set outside of Python are not seen.
    """

    @functools.wraps(verb)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if threading.get_ident() != threading.main_thread().ident:
            return verb(*args, **kwargs)
        handler = signal.getsignal(signal.SIGINT)
        if handler is _remember or not callable(handler):  # held further out, or nothing of Python's would be raised
            return verb(*args, **kwargs)
        try:
            signal.signal(signal.SIGINT, _remember)
            return verb(*args, **kwargs)
        finally:
            try:
                signal.signal(signal.SIGINT, handler)
            except BaseException:  # of another signal's handler, which runs first
                signal.signal(signal.SIGINT, handler)
                raise
            while _came:
                handler(*_came.pop(0))

    return run


def _remember(number: int, frame: FrameType | None) -> None:
    _came.append((number, frame))
