"""What is asked of tensors that others hand over."""

from __future__ import annotations

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8)
"""All but truth values."""


def has_numbers(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor lie in memory of its own, dense or strided.

    Sparse and meta tensors have none there, nor have fake ones, wrapper subclasses, and zeros without storage.
    """
    if tensor.layout != torch.strided or tensor.is_meta:
        return False
    try:
        if type(tensor) is not Tensor and tensor.untyped_storage().device.type == "meta":
            return False  # a fake one, of whose address torch warns
        return bool(tensor.data_ptr()) or not tensor.numel()
    except RuntimeError:  # as torch says it for some of those
        return False


def described(tensor: Tensor) -> str:
    """A tensor, for messages."""
    return f"{type(tensor).__name__} {tensor.dtype} {tuple(tensor.shape)}, {tensor.layout}, on {tensor.device}"
