"""Tables, and lines between them, on standard output."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDEST = 200
"""Columns of a table in a file or a pipe, at most."""


def print_tables(*parts: RenderableType) -> None:
    """As wide as the terminal; in a file or a pipe, which has no width, as wide as they want to be.

    There rich would take 80 columns, and cut numbers off.
    """
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(markup=False)
    if not console.is_terminal:
        limits = console.options.update(max_width=WIDEST)
        wanted = max(Measurement.get(console, limits, part).maximum for part in parts)
        console = Console(markup=False, width=max(wanted, console.width))
    for part in parts:
        console.print(part)
