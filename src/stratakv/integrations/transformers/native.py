"""Forwards of an attached model by the native runner, where a call asks for nothing else than what it computes."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import types
import warnings
from array import array
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.modules import module as modules

from stratakv.errors import UnsupportedError
from stratakv.extension import sample_of
from stratakv.integrations.transformers.cache import KVCache
from stratakv.integrations.transformers.compat import PreTrainedModel, cache_keyword, causal_output
from stratakv.models.native import NativeRunner, calls_more
from stratakv.tensors import has_numbers

_POSITIONS = ("position_ids", "cache_position")
_SERVED = {"input_ids", "attention_mask", *_POSITIONS, "use_cache", "logits_to_keep", "return_dict"}
_CHANGED = (
    "the model was changed since stratakv.attach(model, native=True) copied its weights: it runs in torch from now on; "
    "detach and attach again to have the native runner take the change on"
)


class NativeForward:
    """In the place of a model's `forward`: runs natively what can be, and calls the model's own for all else.

    A copy of the model, pickled or not, gets the forward of its class.

    Args:
        model: one that is attached; it is copied.

    Raises:
        UnsupportedError, CapacityError: as `NativeRunner`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if model.device.type != "cpu":
            raise UnsupportedError(f"the native runner computes in RAM, the model is on {model.device}")
        self._model = model
        self._own = _own_forward(model)
        functools.update_wrapper(self, self._own)
        self._names = tuple(inspect.signature(self._own).parameters)
        self._keyword = cache_keyword(model)
        self.runner = NativeRunner(model, dtype=model.dtype)
        self._state: _State | None = _State(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own forward."""
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache = given.pop(self._keyword, None)
        if cache is None:
            cache = given.pop("past_key_values", None)  # its older name, which is still taken
        if type(cache) is not KVCache or not self._can_run(cache, given):
            return self._own(*args, **kwargs)
        kept = given.get("logits_to_keep", 0)
        logits = cache.feed(lambda batch: self.runner.forward(batch, given["input_ids"], every=kept != 1))
        return causal_output((logits if kept < 2 else logits[:, -kept:]).to(self._model.dtype), cache)

    def __reduce__(self) -> Any:
        return _own_forward, (self._model,)

    def _can_run(self, cache: KVCache, given: Mapping[str, Any]) -> bool:
        """Whether the runner gives what the model's own forward would."""
        model, config, ids = self._model, self._model.config, given.get("input_ids")
        asks_for_more = any(
            value is not None and value is not False for name, value in given.items() if name not in _SERVED
        )
        if (
            asks_for_more
            or not _is_plain(ids)
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or model.training
            or (config.use_cache if given.get("use_cache") is None else given["use_cache"]) is not True
            or (config.return_dict if given.get("return_dict") is None else given["return_dict"]) is not True
            or config.output_hidden_states
            or config.output_attentions
            or type(kept := given.get("logits_to_keep", 0)) is not int
            or kept < 0
        ):
            return False
        batch = cache.batch
        if not cache.is_attached or batch.open_step is not None or self.runner.refuses(batch) is not None:
            return False
        if not _is_next(ids, given, cache.seen_tokens):
            return False
        if self._state is not None and not self._state.is_same():
            warnings.warn(_CHANGED, RuntimeWarning, stacklevel=5)
            self._state = None
        return self._state is not None


def _own_forward(model: PreTrainedModel) -> types.MethodType:
    return types.MethodType(type(model).forward, model)


class _State:
    """What a model consists of, to see whether it is still that. A change of few numbers by `.data` does not show.

    All of it lies elsewhere in memory than what kernels use, so that looking waits for memory: loops are in C.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        held = [part for module in model.modules() for part in (module._modules, module._parameters, module._buffers)]
        self._holders = [each for each in held for _ in each]
        self._names = [name for each in held for name in each]
        self._parts = [part for each in held for part in each.values()]
        self._tensors = [part for part in self._parts if isinstance(part, Tensor)]
        self._versioned = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._sizes = array("Q", [x.nbytes if x.is_contiguous() and x.is_cpu else 0 for x in self._tensors])
        self._found = self._look()
        self._modules = [module for module in model.modules() if module is not model]  # whose hooks are called
        self._hooks = [each for module in self._modules for each in (module._forward_hooks, module._forward_pre_hooks)]
        self._n_hooks = list(map(len, self._hooks))
        self._attributes = list(map(vars, self._modules))

    def is_same(self) -> bool:
        """Whether no part was changed, replaced, patched or given a hook."""
        return (
            not (modules._global_forward_hooks or modules._global_forward_pre_hooks)
            and all(map(operator.is_, map(dict.get, self._holders, self._names), self._parts))
            and self._look() == self._found
            and (self._is_bare() or not any(map(calls_more, self._modules)))
        )

    def _is_bare(self) -> bool:
        """Whether there is no new hook, nor a forward of a module's own; recording of outputs leaves both behind."""
        return list(map(len, self._hooks)) == self._n_hooks and not any(
            map(operator.contains, self._attributes, itertools.repeat("forward"))
        )

    def _look(self) -> tuple[list[int], array[int], int]:
        """Versions, which miss what is done by `.data`; where tensors lie; a number that tells of their contents."""
        addresses = array("Q", map(Tensor.data_ptr, self._tensors))
        versions = list(map(operator.attrgetter("_version"), self._versioned))
        return versions, addresses, sample_of(addresses, self._sizes)


def _is_plain(ids: Any) -> TypeGuard[Tensor]:
    return isinstance(ids, Tensor) and ids.dim() == 2 and ids.is_cpu and has_numbers(ids)


def _is_next(ids: Tensor, given: Mapping[str, Any], seen_tokens: int) -> bool:
    """Whether the tokens are those behind what the cache has seen, with nothing hidden from them."""
    n_new = ids.shape[1]
    mask = given.get("attention_mask")
    if mask is not None and (
        not _is_plain(mask) or mask.shape != (ids.shape[0], seen_tokens + n_new) or not bool(mask.all())
    ):
        return False
    for name in _POSITIONS:
        positions = given.get(name)
        if positions is not None and (
            not isinstance(positions, Tensor)
            or positions.shape[-1:] != (n_new,)
            or not bool((positions == torch.arange(seen_tokens, seen_tokens + n_new, device="cpu")).all())
        ):
            return False
    return True
