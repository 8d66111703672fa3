"""Gradients do not flow through what a cache stores. Where somebody asks for them, that is an error, not a zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stratakv.errors import UnsupportedError


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, likes: Tensor, what: str) -> Tensor:
        del likes
        ctx.what = what
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise UnsupportedError(
            f"no gradient flows through {ctx.what}; train without a cache, or with transformers' own"
        )


def without_gradients(tensor: Tensor, what: str, likes: Tensor | None = None) -> Tensor:
    """`tensor`, whose backward raises UnsupportedError.

    Args:
        tensor: any shape.
        what: for the message.
        likes: the tensor whose gradient is lost, where `tensor` itself is not part of any graph.
    """
    guarded: Tensor = _NoBackward.apply(tensor, tensor if likes is None else likes, what)
    return guarded
