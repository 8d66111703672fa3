"""Whether a model is what its class and its config say, so that its weights alone tell what it computes.

Adapters, quantised layers, hooks and patched methods change what a module computes and leave its `weight` in place: a
runner that reads weights would give other logits than the model, and not notice. So a second model of the same class is
made from the config, without memory for its weights, and the two are compared module by module.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

from stratakv.errors import UnsupportedError

_OWN = ("training", "gradient_checkpointing")  # attributes that say how a module is used
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_is_plain(model: Any) -> None:
    """Raise UnsupportedError, with the place, where a model is not one of transformers' own as it was made."""
    kind = type(model)
    if getattr(transformers, kind.__name__, None) is not kind:
        raise UnsupportedError(f"{kind.__module__}.{kind.__qualname__} is not transformers' own {kind.__name__}")
    with torch.device("meta"):
        made = kind(copy.deepcopy(model.config))
    expected = dict(made.named_modules())
    found = dict(model.named_modules())
    if different := sorted(expected.keys() ^ found.keys()):
        raise UnsupportedError(f"by its config the model has {len(expected)} modules, it differs in {different[0]!r}")
    for name, module in found.items():
        _check_module(name or kind.__name__, module, expected[name])


def _check_module(name: str, module: Any, expected: Any) -> None:
    if type(module) is not type(expected):
        raise UnsupportedError(f"{name} is a {type(module).__name__}, not a {type(expected).__name__}")
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    foreign = [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("transformers.")]
    if foreign or "forward" in vars(module):
        raise UnsupportedError(f"{name} has a hook or another forward, which would not be called")
    for attribute, value in _facts(expected).items():
        if (own := vars(module).get(attribute)) != value:
            raise UnsupportedError(f"{name}.{attribute} is {own}, by the config {value}")
    parameters = dict(module.named_parameters(recurse=False))
    shapes = {key: tuple(parameter.shape) for key, parameter in parameters.items()}
    if shapes != (wanted := {key: tuple(p.shape) for key, p in expected.named_parameters(recurse=False)}):
        raise UnsupportedError(f"{name} has the weights {shapes}, by the config {wanted}")
    for key, parameter in parameters.items():
        if parameter.dtype not in WEIGHT_DTYPES or parameter.device.type == "meta":
            raise UnsupportedError(f"{name}.{key} is {parameter.dtype} on {parameter.device}")


def _facts(module: Any) -> dict[str, Any]:
    """The public attributes of a module that are plain numbers or words."""
    plain = (bool, int, float, str, type(None))
    return {
        key: value
        for key, value in vars(module).items()
        if type(value) in plain and not key.startswith("_") and key not in _OWN
    }
