"""Whether a model is what its class and its config say, so that its weights alone tell what it computes.

Adapters, quantised layers, hooks and patched instances change what a module computes and leave its `weight` in place: a
runner that reads weights would give other logits than the model, and not notice. So a second model of the same class is
made from the config, without memory for its weights, and the two are compared module by module; functions that forwards
call have to be where they were written. What no comparison can find, such as something changed within torch, shows in
the logits: the runner is tried once beside it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.modules import module as modules
from transformers import masking_utils
from transformers.integrations import sdpa_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stratakv.errors import UnsupportedError

_SOURCES = ("transformers", "torch", "stratakv")
_HARMLESS = ("typing", "dataclasses")
_COMPILED = ("__compiled_fn", "__resume_at")  # which torch.compile puts there; nobody calls them by name
_NOTHING = object()
_FLASH = (None, "flash_attention_forward"), "flash_attention_mask"
# What attends and what makes the masks, by the name under which a model asks for both.
_WAYS = {
    "eager": ((None,), "eager_mask"),
    "sdpa": (("sdpa_attention_forward",), "sdpa_mask"),
    "flex_attention": (("flex_attention_forward",), "flex_attention_mask"),
    **{f"flash_attention_{n}": _FLASH for n in (2, 3, 4)},
    "stratakv": (("attention_forward",), "sdpa_mask"),
}
# Attributes that say how a module is used or trained, or that its weights' shapes and the angles tell as well.
_OWN = {
    *("training", "gradient_checkpointing", "name_or_path", "attention_dropout", "loss_type", "kernel_config"),
    *("padding_idx", "vocab_size", "max_seq_len_cached", "original_max_seq_len"),
}
# What rounding to a dtype can do to logits, relative to their size: several times the most that was seen with real
# models. A model in half precision rounds after every operation, and a token now and then tips over altogether.
_ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.15}
WEIGHT_DTYPES = tuple(_ROUNDING)
PROBE_TOKENS = 16
"""Few, since a large model takes long for each. What shows only further on, like a window's mask, is compared above."""


def check_is_plain(model: Any) -> None:
    """Raise UnsupportedError, with the place, where a model is not one of transformers' own as it was made."""
    kind = type(model)
    if getattr(transformers, kind.__name__, None) is not kind:
        raise UnsupportedError(f"{kind.__module__}.{kind.__qualname__} is not transformers' own {kind.__name__}")
    _check_attention(model.config)
    if modules._global_forward_hooks or modules._global_forward_pre_hooks:
        raise UnsupportedError("torch has forward hooks for all modules, which would not be called")
    with torch.device("meta"):
        made = kind(copy.deepcopy(model.config))
    expected = dict(made.named_modules())
    found = dict(model.named_modules())
    if different := sorted(expected.keys() ^ found.keys()):
        raise UnsupportedError(f"by its config the model has {len(expected)} modules, it differs in {different[0]!r}")
    for each in {kind, *map(type, found.values())}:
        _check_functions(each)
    for module in (masking_utils, sdpa_attention):
        _check_names(module)
    for name, module in found.items():
        _check_module(name or kind.__name__, module, expected[name])
        if not _is_same(getattr(module, "config", model.config), model.config):
            raise UnsupportedError(f"{name} has another config than the model")


def check_logits(model: Any, forward: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Raise UnsupportedError where `forward`, tokens to logits of all of them, computes something else than `model`.

    Args:
        model: is run as in evaluation mode, and left in its own.
        forward: the runner.
        dtype: what the runner rounds weights to.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, PROBE_TOKENS), generator=generator, device="cpu")
    training = {name: module.training for name, module in model.named_modules()}
    try:
        model.eval()
        with torch.no_grad():
            expected = model(input_ids=tokens.to(model.device), use_cache=False).logits.float().cpu()
    except Exception as error:
        raise UnsupportedError(f"the model itself fails on {PROBE_TOKENS} tokens: {error}") from error
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
    if not torch.isfinite(expected).all():
        raise UnsupportedError(f"the model's own logits in {model.dtype} are not finite")
    difference = (forward(tokens) - expected).square().mean(-1).sqrt()
    share = float((difference / expected.square().mean(-1).sqrt()).median())
    if not share <= (allowed := max(_ROUNDING[dtype], _ROUNDING[model.dtype])):
        raise UnsupportedError(
            f"the model computes something else than its class and weights say: most logits differ by {share:.2g} of "
            f"their size, where rounding explains {allowed:.2g}"
        )


def _check_module(name: str, module: Any, expected: Any) -> None:
    kind = type(module)
    if kind is not type(expected):
        raise UnsupportedError(f"{name} is a {kind.__name__}, not a {type(expected).__name__}")
    if calls_more(module):
        raise UnsupportedError(f"{name} has a hook or another forward, which would not be called")
    for attribute, value in _facts(expected).items():
        if (found := vars(module).get(attribute)) != value:
            raise UnsupportedError(f"{name}.{attribute} is {found}, by the config {value}")
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


def _check_functions(kind: type) -> None:
    """Look at the forward of a class of modules, and at what its forward may call by name."""
    forward = inspect.getattr_static(kind, "forward")
    own = next(base for base in kind.__mro__ if "forward" in vars(base))
    for name in ("forward", "__call__", "_wrapped_call_impl", "_call_impl"):
        if foreign := _foreign(inspect.getattr_static(kind, name)):
            raise UnsupportedError(f"the {name} of {kind.__name__} is one of {foreign}")
    if not issubclass(kind, transformers.PreTrainedModel):  # which have methods of many kinds
        for name, method in vars(kind).items():
            if isinstance(method, FunctionType) and name != "__init__" and (foreign := _foreign(method)):
                raise UnsupportedError(f"the {name} of {kind.__name__} is one of {foreign}")
    if kind.__module__.startswith("transformers.models."):
        if not (written := inspect.unwrap(forward).__qualname__).startswith(f"{own.__name__}."):
            raise UnsupportedError(f"the forward of {kind.__name__} is {written}")
        _check_names(sys.modules[kind.__module__])


def _check_names(module: ModuleType) -> None:
    """Refuse functions that were put in the place of others in one of transformers' modules."""
    for name, function in vars(module).items():
        if not callable(function) or isinstance(function, type) or name.startswith(_COMPILED):
            continue
        own = _decorated(function)
        foreign = _foreign(own)
        if foreign in _HARMLESS:
            continue
        if foreign or getattr(own, "__name__", None) != name:
            raise UnsupportedError(f"{name} in {module.__name__} is {function}, of {foreign or 'another name'}")


def _decorated(function: Any) -> Any:
    """The function that the package `kernels` made a module of, which calls it; any other one is itself."""
    kind = type(function)
    forward = inspect.getattr_static(kind, "forward", None)
    if kind.__module__ != "kernels.layer.layer" or "forward" in vars(function) or not isinstance(forward, FunctionType):
        return function
    return inspect.getclosurevars(forward).nonlocals.get("func", function)


def _foreign(function: Any) -> str | None:
    """The module a function was written in, or one that it wraps, where that is not one of `_SOURCES`.

    `__module__` tells nothing: wrappers copy it from what they wrap.
    """
    while function is not None:
        inner = function.func if isinstance(function, functools.partial) else getattr(function, "__func__", function)
        written_in = str(getattr(inner, "__globals__", {}).get("__name__") or type(inner).__module__)
        is_memo = isinstance(inner, functools._lru_cache_wrapper)
        if written_in.partition(".")[0] not in _SOURCES and not is_memo:
            return written_in
        function = getattr(inner, "__wrapped__", None)
    return None


def calls_more(module: Any) -> bool:
    """Whether a module has a hook that is not transformers' own, or functions in the place of its class's."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    recorders = [hook for hook in hooks if str(getattr(hook, "__module__", "")).startswith("transformers.")]
    is_hooked = len(recorders) < len(hooks) or any(map(_foreign, recorders))
    return is_hooked or any(_is_patch(module, name, value) for name, value in vars(module).items() if callable(value))


def _is_patch(module: Any, name: str, function: Any) -> bool:
    """Whether a function of an instance hides another one of its class. Recorders may have put that back."""
    own = getattr(type(module), name, _NOTHING)
    is_own = getattr(function, "__func__", function) is own and getattr(function, "__self__", module) is module
    return own is not _NOTHING and not is_own


def _check_attention(config: Any) -> None:
    name = getattr(config, "_attn_implementation", None) or "eager"
    attention, mask = ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    names, mask_name = _WAYS.get(name, ((), ""))
    is_own = getattr(attention, "__name__", None) in names and getattr(mask, "__name__", None) == mask_name
    if not is_own or _foreign(attention) or _foreign(mask):
        raise UnsupportedError(f"the model attends by {name!r}, which is not one of transformers' own ways")
    if getattr(config, "is_causal", True) is False:
        raise UnsupportedError("the native runner is causal; this model attends in both directions")


def _is_same(config: Any, other: Any) -> bool:
    if config is other:
        return True
    return bool((config.to_dict(), config._attn_implementation) == (other.to_dict(), other._attn_implementation))


def _facts(module: Any) -> dict[str, Any]:
    """The public attributes of a module that are plain numbers or words."""
    plain = (bool, int, float, str, type(None))
    return {
        key: value
        for key, value in vars(module).items()
        if type(value) in plain and not key.startswith("_") and key not in _OWN
    }
