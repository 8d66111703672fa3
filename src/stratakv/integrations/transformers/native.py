"""Forwards of an attached model by the native runner, where a call asks for nothing else than what it computes."""

from __future__ import annotations

import inspect
import types
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from stratakv.errors import StateError, UnsupportedError
from stratakv.integrations.transformers.cache import KVCache
from stratakv.integrations.transformers.compat import PreTrainedModel, cache_keyword, causal_output
from stratakv.integrations.transformers.snapshot import HOOKED, Snapshot
from stratakv.models.native import NativeRunner
from stratakv.tensors import has_numbers

_POSITIONS = ("position_ids", "cache_position")
_SERVED = {"input_ids", "attention_mask", *_POSITIONS, "use_cache", "logits_to_keep", "return_dict"}
_FALSE_IS_NOTHING = {"output_attentions", "output_hidden_states"}
_CHANGED = (
    "{}: what the native runner has of the model does not hold any more, so that it runs in torch; call "
    "stratakv.attach(model, native=True) again to have the change taken on"
)


class NativeForward:
    """In the place of a model's `forward`: runs natively what can be, and calls the model's own for all else.

    A deep copy of the model, pickled or not, gets the forward of its class.

    Args:
        model: one that is attached; its weights are copied, it is not held.

    Raises:
        UnsupportedError, CapacityError: as `NativeRunner`; and a model that is not in RAM, or of several dtypes.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if model.device.type != "cpu":
            raise UnsupportedError(f"the native runner computes in RAM, the model is on {model.device}")
        if others := {parameter.dtype for parameter in model.parameters()} - {model.dtype}:
            raise UnsupportedError(f"the native runner has weights of one dtype, the model of {model.dtype}, {others}")
        self._model: Any = weakref.ref(model)
        self.__signature__ = inspect.signature(model.forward)
        self.__doc__ = model.forward.__doc__
        parameters = self.__signature__.parameters.values()
        self._names = tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)
        self._keyword = cache_keyword(model)
        self._copied: tuple[NativeRunner, Snapshot] | None = NativeRunner(model, dtype=model.dtype), Snapshot(model)
        self._has_warned = False
        self.reason: str | None = None
        """Why the last forward was the model's own; None: it was not."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own forward."""
        model = self._model()
        own = _own_forward(model)
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        is_unclear = len(given) != len(args) + len(kwargs) or len(args) > len(self._names)
        # Its older name is still taken where the other one is not given.
        cache = given.pop(self._keyword if self._keyword in given else "past_key_values", None)
        copied = self._copied  # another thread may let it go
        reason = "arguments are given twice" if is_unclear else self._reason_against(model, copied, cache, given)
        self.reason = reason
        if reason is not None or copied is None:
            return own(*args, **kwargs)
        self._has_warned = False
        ids, kept = given["input_ids"], given.get("logits_to_keep", 0)
        kept = min(kept, ids.shape[1]) or ids.shape[1]
        logits = cache.feed(lambda batch: copied[0].forward(batch, ids, last=kept), model.dtype)
        return causal_output(logits.to(model.dtype), cache)

    def __reduce__(self) -> Any:
        return _own_forward, (self._model(),)

    @property
    def is_current(self) -> bool:
        """Whether the model is still what was copied."""
        if self._copied is None:
            return False
        model, (_, snapshot) = self._model(), self._copied
        return not snapshot.weights_differ(model) and snapshot.difference(model) is None

    def _reason_against(
        self, model: Any, copied: tuple[NativeRunner, Snapshot] | None, cache: Any, given: Mapping[str, Any]
    ) -> str | None:
        """Why the model's own forward is called, or None: then the runner gives the same."""
        reason = next((reason for holds, reason in _conditions(model, cache, given) if not holds), None)
        if reason is not None:
            return reason
        if copied is None:
            return "weights were changed"
        runner, snapshot = copied
        if (reason := runner.refuses(cache.batch)) is not None:
            return reason
        if snapshot.weights_differ(model):
            self._copied = None  # they seldom come back, and hold as much memory as the model
            reason = "weights or modules of the model were changed"
        else:
            reason = snapshot.difference(model)
        if reason not in (None, HOOKED) and not self._has_warned:
            self._has_warned = True
            warnings.warn(_CHANGED.format(reason), RuntimeWarning, stacklevel=5)
        return reason


def _conditions(model: Any, cache: Any, given: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    """What has to hold for a call, and why it is not the runner's where it does not. Each stands on those before."""
    for name, value in given.items():
        is_nothing = value is None or (value is False and name in _FALSE_IS_NOTHING)
        yield name in _SERVED or is_nothing, f"{name} is given"
    config, kept = model.config, given.get("logits_to_keep", 0)
    ids: Any = given.get("input_ids")
    yield type(cache) is KVCache, "there is no KVCache"
    yield "update" not in vars(cache), "the cache has an update of its own"
    yield not torch.is_grad_enabled(), "gradients are on: use torch.no_grad() or torch.inference_mode()"
    yield not (model.training or torch.is_autocast_enabled("cpu")), "it is in training mode, or under autocast"
    yield all(type(mode) is DeviceContext for mode in _modes()), "a mode of torch is on, which would see nothing"
    yield (
        (_is_numbers(ids, torch.int64, torch.int32) and ids.dim() == 2 and bool(ids.numel())),
        "input_ids are not [n_sequences, n_tokens] of int64 or int32 in RAM",
    )
    for name, reason in (("use_cache", "no cache is to be used"), ("return_dict", "a tuple is asked for")):
        yield (getattr(config, name) if given.get(name) is None else given[name]) is True, reason
    yield not (config.output_hidden_states or config.output_attentions), "its config asks for more than logits"
    yield type(kept) is int and kept >= 0, "logits_to_keep is not a number of tokens"
    yield cache.is_attached and cache.batch.open_step is None, "the cache is in use otherwise"
    yield cache.stores_as(model.dtype), f"the cache was made for another dtype than {model.dtype}"
    (n_sequences, n_new), seen_tokens = ids.shape, cache.seen_tokens
    mask = given.get("attention_mask")
    yield (
        mask is None or (_is_numbers(mask) and mask.shape == (n_sequences, seen_tokens + n_new) and bool(mask.all())),
        "the attention mask hides something, or is not [n_sequences, tokens seen and new]",
    )
    for name, shapes in (("position_ids", ((1, n_new), (n_sequences, n_new))), ("cache_position", ((n_new,),))):
        found = given.get(name)
        is_next = found is None or (
            _is_numbers(found, torch.int64, torch.int32)
            and found.shape in shapes
            and bool((found == torch.arange(seen_tokens, seen_tokens + n_new, device="cpu")).all())
        )
        yield is_next, f"{name} are not those that follow what the cache has seen"


def _is_numbers(tensor: Any, *dtypes: torch.dtype) -> bool:
    return (
        isinstance(tensor, Tensor) and tensor.is_cpu and has_numbers(tensor) and (not dtypes or tensor.dtype in dtypes)
    )


def _modes() -> list[Any]:
    return [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]


def _own_forward(model: Any) -> types.MethodType:
    if model is None:
        raise StateError("the model whose forward this was is gone")
    return types.MethodType(type(model).forward, model)
