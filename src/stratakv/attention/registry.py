"""Which backend attends: the first that is there and serves the call."""

from __future__ import annotations

import functools
import warnings

import torch

from stratakv.attention.base import AttentionBackend, AttentionOptions
from stratakv.attention.cpu import CpuBackend
from stratakv.attention.reference import ReferenceBackend
from stratakv.blocks.view import KVView
from stratakv.extension import is_built

NOT_BUILT = (
    "stratakv was installed without its C++ extension, so attention over pages runs in plain torch, which is right and "
    "slow; install a C++ compiler and reinstall without STRATAKV_NO_EXTENSION"
)


@functools.cache
def backends() -> tuple[AttentionBackend, ...]:
    """All that this installation has, best first. Warns once where the kernels are not among them."""
    if not is_built():
        warnings.warn(NOT_BUILT, RuntimeWarning, stacklevel=2)
        return (ReferenceBackend(),)
    return (CpuBackend(), ReferenceBackend())


def backend_for(view: KVView, options: AttentionOptions, dtype: torch.dtype) -> AttentionBackend:
    """The backend for queries of `dtype`. The reference, which is last, serves everything."""
    return next(backend for backend in backends() if backend.supports(view, options, dtype) is None)
