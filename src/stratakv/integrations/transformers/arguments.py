"""Whole numbers in lists, tensors and arrays as others hand them over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stratakv.errors import ConfigurationError


def whole_numbers(name: str, given: Any) -> Tensor:
    """int64 on the CPU, in the shape of `given`; nothing is rounded, and truth values are no numbers.

    Raises:
        ConfigurationError: anything else; `name` says what it was for.
    """
    try:
        found = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{name} must be whole numbers, got {type(given).__name__}: {error}") from error
    if found.numel() and (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool):
        raise ConfigurationError(f"{name} must be whole numbers, got {found.dtype}")
    return found.long()
