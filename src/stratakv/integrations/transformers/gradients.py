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


def without_gradients(tensor: Tensor, what: str, likes: Tensor) -> Tensor:
    """`tensor`, whose backward raises UnsupportedError.

    Args:
        tensor: any shape.
        what: for the message.
        likes: a tensor of the graph, whose gradient would be wrong.
    """
    guarded: Tensor = _NoBackward.apply(tensor, likes, what)
    return guarded
