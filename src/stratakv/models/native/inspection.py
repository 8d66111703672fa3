"""Whether a model is what its class and its config say, so that its weights alone tell what it computes.

Adapters, quantised layers, hooks and patched instances change what a module computes and leave its `weight` in place: a
runner that reads weights would give other logits than the model, and not notice. So a second model of the same class is
made from the config, without memory for its weights, and the two are compared module by module.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stratakv.errors import UnsupportedError

_SOURCES = ("transformers", "torch", "stratakv")
_WITHOUT_FUNCTION = ("eager", "flash_attention_2", "flash_attention_3", "flash_attention_4")
# Attributes that say how a module is used or trained, or that its weights' shapes and the angles tell as well.
_OWN = {
    *("training", "gradient_checkpointing", "name_or_path", "attention_dropout", "loss_type", "kernel_config"),
    *("padding_idx", "vocab_size", "max_seq_len_cached", "original_max_seq_len"),
}
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_is_plain(model: Any) -> None:
    """Raise UnsupportedError, with the place, where a model is not one of transformers' own as it was made."""
    kind = type(model)
    if getattr(transformers, kind.__name__, None) is not kind:
        raise UnsupportedError(f"{kind.__module__}.{kind.__qualname__} is not transformers' own {kind.__name__}")
    _check_attention(model.config)
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
    own = getattr(type(module).forward, "__module__", "")
    if not own.startswith(_SOURCES):
        raise UnsupportedError(f"the forward of {type(module).__name__} is one of {own or 'nobody'}")
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    foreign = [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("transformers.")]
    if foreign or "_call_impl" in vars(module) or _is_patched(module):
        raise UnsupportedError(f"{name} has a hook or another forward, which would not be called")
    for attribute, value in _facts(expected).items():
        if (own := vars(module).get(attribute)) != value:
            raise UnsupportedError(f"{name}.{attribute} is {own}, by the config {value}")
    parameters = dict(module.named_parameters(recurse=False))
    shapes = {key: tuple(parameter.shape) for key, parameter in parameters.items()}
    if shapes != (wanted := {key: tuple(p.shape) for key, p in expected.named_parameters(recurse=False)}):
        raise UnsupportedError(f"{name} has the weights {shapes}, by the config {wanted}")
    for key, parameter in parameters.items():
        is_plain = type(parameter) is torch.nn.Parameter and parameter.layout == torch.strided
        if not is_plain or parameter.dtype not in WEIGHT_DTYPES or parameter.device.type == "meta":
            raise UnsupportedError(
                f"{name}.{key} is a {type(parameter).__name__} of {parameter.dtype} ({parameter.layout}) on "
                f"{parameter.device}"
            )


def _is_patched(module: Any) -> bool:
    """Whether an instance has a forward of its own. What recorded its outputs may have put back its class's."""
    forward = vars(module).get("forward")
    if forward is None:
        return False
    return getattr(forward, "__func__", None) is not type(module).forward or forward.__self__ is not module


def _check_attention(config: Any) -> None:
    name = getattr(config, "_attn_implementation", None) or "eager"
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    source = "transformers" if function is None else str(getattr(function, "__module__", ""))
    if not source.startswith(_SOURCES) or (function is None and name not in _WITHOUT_FUNCTION):
        raise UnsupportedError(f"the model attends by {name!r}, which is not one of transformers' own ways")
    if getattr(config, "is_causal", True) is False:
        raise UnsupportedError("the native runner is causal; this model attends in both directions")


def _facts(module: Any) -> dict[str, Any]:
    """The public attributes of a module that are plain numbers or words."""
    plain = (bool, int, float, str, type(None))
    return {
        key: value
        for key, value in vars(module).items()
        if type(value) in plain and not key.startswith("_") and key not in _OWN
    }
