"""Tables, and lines between them, on standard output."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

NARROWEST, WIDEST = 80, 200
"""Columns of what goes into a file or a pipe."""


def print_tables(*parts: RenderableType) -> None:
    """As wide as the terminal, or as COLUMNS says; in a file or a pipe as wide as the tables, within bounds.

    Left alone, rich takes 80 columns there, and cuts numbers off.
    """
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(markup=False)
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        limits = console.options.update(max_width=WIDEST)
        console.width = max(NARROWEST, *(Measurement.get(console, limits, part).maximum for part in parts))
    for part in parts:
        console.print(part)
