"""Tables, and lines between them, on standard output."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDEST = 200
"""Columns that a file or a pipe gets at most, however wide the tables are."""


def print_tables(*parts: RenderableType) -> None:
    """As wide as the terminal, or as COLUMNS says; in a file or a pipe as wide as the widest of them.

    Left alone, rich takes 80 columns where there is no terminal at all, and cuts numbers off. What it cannot read in
    COLUMNS is as good as nothing.
    """
    from rich.console import Console, ConsoleDimensions
    from rich.measure import Measurement

    console = Console(markup=False)
    columns = os.environ.get("COLUMNS", "")
    if not sys.stdout.isatty() and not (columns.isdigit() and int(columns) > 0):
        limits = console.options.update(max_width=WIDEST)
        width = max((Measurement.get(console, limits, part).maximum for part in parts), default=WIDEST)
        console.size = ConsoleDimensions(width, console.height)  # a width alone is not kept to on a dumb terminal
    for part in parts:
        console.print(part)
