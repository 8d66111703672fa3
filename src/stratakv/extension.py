"""The C++ extension: whether it is there, what this processor can run of it, and how it names numbers."""

from __future__ import annotations

import importlib
import os
from array import array
from typing import Any

import torch
from torch import Tensor

from stratakv.errors import ConfigurationError, UnsupportedError

try:  # by its name, so that the package's root, which knows all parts, is not imported here
    _kernels: Any = importlib.import_module("stratakv._kernels")
except ImportError:  # installed without the extension
    _kernels = None

NUMBER_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORMATS = {"fp32": 0, "bf16": 1, "fp16": 2, "fp8": 3, "int8": 4, "int4": 5, "int2": 6}
"""Those of pages."""
FLOAT_FORMATS = ("fp32", "bf16", "fp16")
MOST_PACKED_DIM = 1024
"""The largest head dim in all other formats."""


def is_built() -> bool:
    """Whether the extension was compiled and could be loaded."""
    return _kernels is not None


def instruction_sets() -> tuple[str, ...]:
    """What this processor can run, best first."""
    return tuple(_kernels.supported_isas()) if _kernels is not None else ()


def load_kernels(isa: str | None = None) -> tuple[Any, str]:
    """The extension, and the instruction set to use: `isa`, or what STRATAKV_ISA names, or the best there is.

    Raises:
        UnsupportedError: the extension is not there. ConfigurationError: this processor has no such instruction set.
    """
    if _kernels is None:
        raise UnsupportedError("the extension stratakv._kernels was not built; install a C++ compiler and reinstall")
    chosen = isa or os.environ.get("STRATAKV_ISA")
    if not chosen:
        return _kernels, instruction_sets()[0]
    if not _kernels.is_supported(chosen):  # asking for all of them would enlarge the process's signal frames, for AMX
        raise ConfigurationError(f"the instruction set {chosen!r} is not one of {', '.join(instruction_sets())}")
    return _kernels, chosen


def sample_of(addresses: array[int], sizes: array[int]) -> int:
    """A number that differs, all but surely, where many bytes of some memory do, from eight words of each stretch.

    Args:
        addresses: of stretches in RAM, as array("Q").
        sizes: of each in bytes, likewise.
    """
    return int(_kernels.sample_of(addresses.buffer_info()[0], sizes.buffer_info()[0], len(addresses)))


def read_all(words: Tensor) -> int:
    """The sum of all of `words`, int64 `[n]` in RAM, by as many threads as attention takes: a measure of bandwidth.

    Without the extension torch reads them.
    """
    if _kernels is None:
        return int(words.sum())
    return int(_kernels.read_all(words.data_ptr(), words.numel(), torch.get_num_threads()))
