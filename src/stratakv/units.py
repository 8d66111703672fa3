"""Sizes and numbers as people write them."""

from __future__ import annotations

import operator
import re
from fractions import Fraction
from typing import Any

from stratakv.errors import ConfigurationError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def whole(name: str, number: Any) -> int:
    """A whole number as int: also one of numpy's, or a tensor of one, on a device too.

    Raises:
        ConfigurationError: anything else, truth values as well; `name` says what it was for.
    """
    is_truth = isinstance(number, bool) or str(getattr(number, "dtype", "")) == "torch.bool"
    try:
        if not is_truth:
            return operator.index(number)
    except (TypeError, RuntimeError):
        pass
    raise ConfigurationError(f"{name} must be a whole number, got {number!r}")


def parse_bytes(size: float | str) -> int:
    """Bytes from a number or from text like `"2GiB"`, `"512 MB"`.

    Raises:
        ConfigurationError: not a size, or not above 0.
    """
    if isinstance(size, str):
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?)?b?\s*", size.lower())
        n_bytes = int(Fraction(found[1]) * _UNITS[found[2] or ""]) if found else 0
    else:
        n_bytes = whole("a size in bytes", int(size) if isinstance(size, float) and size.is_integer() else size)
    if n_bytes < 1:
        raise ConfigurationError(f"a size is a number of bytes or text like '2GiB' or '512MB', got {size!r}")
    return n_bytes


def format_bytes(n_bytes: float) -> str:
    """`n_bytes` with a binary unit, three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024 or unit == "GiB":
            return (
                f"{n_bytes:.0f} {unit}"
                if unit == "B"
                else f"{n_bytes:.3g} {unit}"
                if n_bytes < 1000
                else f"{n_bytes:.0f} {unit}"
            )
        n_bytes /= 1024
    raise AssertionError
