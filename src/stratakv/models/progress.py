"""What a long load tells its caller, and the bar a terminal shows of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import rich.progress
from rich.console import Console


class Progress(Protocol):
    """Receives the steps of a long piece of work. Implementations must not raise."""

    def stage(self, text: str) -> None:
        """Say what is being done from now on; its extent is not yet known."""

    def advance(self, done: int, total: int) -> None:
        """Say how far the present stage has come: `done` of `total`, in whatever unit the stage counts."""


class SilentProgress:
    """Shows nothing."""

    def stage(self, text: str) -> None:
        """Ignore the stage."""

    def advance(self, done: int, total: int) -> None:
        """Ignore the advance."""


class RichProgress:
    """Shows stages on a running `rich.progress.Progress` display."""

    def __init__(self, display: rich.progress.Progress) -> None:
        self._display = display
        self._task = display.add_task("", total=None, visible=False)

    def stage(self, text: str) -> None:
        """Replace the line shown and start its bar anew."""
        self._display.reset(self._task, description=text, total=None, visible=True)

    def advance(self, done: int, total: int) -> None:
        """Move the bar of the present stage."""
        self._display.update(self._task, completed=done, total=total)


@contextmanager
def terminal_progress() -> Iterator[Progress]:
    """Yield a progress display on stderr where that is a terminal, and a silent one where it is not.

    The display erases itself at the end, so that what stays on the screen is what the command printed.
    """
    if not sys.stderr.isatty():
        yield SilentProgress()
        return
    # The stream is bound now: a load redirects `sys.stderr` for a while, and the bar must go on through it. For the
    # same reason rich must not put its own proxy in `sys.stderr`.
    display = rich.progress.Progress(
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TimeElapsedColumn(),
        console=Console(file=sys.stderr),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with display:
        yield RichProgress(display)
