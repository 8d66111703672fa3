"""Seeded weights that make every layer, gate and cache row matter.

Published initialisations (std 0.02, zero gates) give a tiny model whose logits hardly depend on the context: a cache
fault would drown in rounding. Matrices are redrawn with unit gain, so that queries and keys have unit variance and
attention is far from uniform; what is initialised to zero gets a little noise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

_BIAS_STD = 0.1
_EMBEDDING_STD = 0.5
# Parameters of recurrences are only stable in the range their model initialises them to.
_KEPT = ("a_log", "dt_", "dt.", "decay", "time_", "lambda", "recurrent_param", "ssm")


@torch.no_grad()
def redraw(model: nn.Module, seed: int) -> None:
    """Redraw the parameters of ``model`` in place, deterministically from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            _redraw_one(f"{prefix}.{name}".lower(), module, parameter, generator)


def _redraw_one(path: str, module: nn.Module, parameter: Tensor, generator: torch.Generator) -> None:
    if not parameter.is_floating_point() or parameter.numel() == 0:
        return
    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    if not bool(torch.isfinite(parameter).all()):
        parameter.copy_(noise * _BIAS_STD)
    elif any(part in path for part in _KEPT) or path.endswith(".d"):
        return
    elif isinstance(module, nn.Embedding):
        parameter.copy_(noise * _EMBEDDING_STD)
        if module.padding_idx is not None:
            parameter[module.padding_idx].zero_()
    elif parameter.dim() < 2:
        # Norm weights stay near their ones or zeros; biases, sinks and scalar gates leave zero.
        parameter.add_(noise * _BIAS_STD)
    elif _looks_initialised_small(parameter) or isinstance(module, nn.Linear):
        parameter.copy_(noise / math.sqrt(_fan_in(module, parameter)))


def _looks_initialised_small(parameter: Tensor) -> bool:
    constant = bool((parameter == parameter.flatten()[0]).all())
    return constant or (float(parameter.std()) < 0.2 and abs(float(parameter.mean())) < 0.02)


def _fan_in(module: Any, parameter: Tensor) -> float:
    """Inputs of one output: the last axis of a Linear, all but the first of a convolution, the mean for experts."""
    shape = parameter.shape
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return float(max(1, math.prod(shape[1:])))
    if isinstance(module, nn.Linear) or parameter.dim() == 2:
        return float(max(1, shape[-1]))
    return max(1.0, (shape[-1] + shape[-2]) / 2)
