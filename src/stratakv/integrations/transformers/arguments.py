"""Models, and whole numbers in lists, tensors and arrays, as others hand them over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stratakv.errors import ConfigurationError
from stratakv.tensors import INTEGERS


def check_model(given: Any) -> None:
    """Refuse with ConfigurationError what is no model."""
    if not isinstance(given, torch.nn.Module) or not hasattr(given, "config"):
        hint = (
            "; the model is its attribute `model`" if isinstance(getattr(given, "model", None), torch.nn.Module) else ""
        )
        raise ConfigurationError(f"a transformers model is needed, got {type(given).__name__}{hint}")


def whole_numbers(name: str, given: Any) -> Tensor:
    """int64 on the CPU, in the shape of `given`; nothing is rounded, and truth values are no numbers.

    Raises:
        ConfigurationError: anything else; `name` says what it was for.
    """
    if isinstance(given, (bytes, bytearray, memoryview)) or (isinstance(given, (list, tuple)) and _has_truth(given)):
        raise ConfigurationError(f"{name} must be whole numbers, got {given!r}")
    try:
        found = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{name} must be whole numbers, got {type(given).__name__}: {error}") from error
    if isinstance(given, (list, tuple)) and not found.numel():
        found = found.long()  # torch takes an empty list for floats
    if found.layout != torch.strided or found.dtype not in INTEGERS:
        raise ConfigurationError(f"{name} must be whole numbers, got {found.dtype}, {found.layout}")
    numbers = found.long()
    if found.dtype == torch.uint64 and bool((numbers < 0).any()):
        raise ConfigurationError(f"{name} must be whole numbers below 2**63, got {given!r}")
    return numbers


def _has_truth(given: Any) -> bool:
    """Whether a truth value stands among the numbers of nested lists, where torch would take it for 0 or 1."""
    if isinstance(given, (list, tuple)):
        return any(map(_has_truth, given))
    return isinstance(given, bool) or str(getattr(given, "dtype", "")) in ("bool", "torch.bool")
