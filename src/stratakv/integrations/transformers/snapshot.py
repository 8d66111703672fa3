"""Whether a model is still what it was: its parts, weights, attributes, config, code and hooks."""

from __future__ import annotations

import copy
import itertools
import operator
import sys
import types
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as modules
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stratakv.errors import UnsupportedError
from stratakv.extension import sample_of
from stratakv.integrations.transformers.compat import PreTrainedModel
from stratakv.integrations.transformers.state import ATTENTION_NAME
from stratakv.models.native import calls_more

HOOKED = "a module has a hook or a forward of its own"
_NOT_COMPUTED = {"generation_config", "name_or_path", "gradient_checkpointing"}
_OF_CALLS = {"use_cache", "return_dict", "output_hidden_states", "output_attentions"}  # which are looked at in each
_CALLED = operator.attrgetter("forward", "__call__", "_call_impl", "_wrapped_call_impl")
_HOOKS, _PRE_HOOKS = operator.itemgetter("_forward_hooks"), operator.itemgetter("_forward_pre_hooks")
_GET: Callable[..., Any] = dict.get
_PARTS = ("_modules", "_parameters", "_buffers")
_OF_ANY_MODULE = vars(torch.nn.Module()).keys()


class Snapshot:
    """What a model consists of. It is not held, but its weights of then are.

    Whoever asks does so before each step, and all of this lies elsewhere in memory than what kernels use: loops are in
    C, and attributes of linear layers, of which most modules are, are not looked at.

    Raises:
        UnsupportedError: it could change unseen.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        everything = list(model.modules())
        below = everything[1:]
        parts = [
            (held, name, part)
            for module in everything
            for held in map(vars(module).get, _PARTS)
            for name, part in held.items()
        ]
        self._tensors = [part for _, _, part in parts if isinstance(part, Tensor)]
        if any(tensor.is_inference() for tensor in self._tensors):
            raise UnsupportedError(
                "weights made under torch.inference_mode() do not count their changes; load the model outside it"
            )
        self._below, self._namespaces, self._types = below, list(map(vars, below)), list(map(type, below))
        self._type, self._own_parts = type(model), [vars(model)[name] for name in _PARTS]
        held = [(space, name, space[name]) for space in self._namespaces for name in _PARTS]
        self._parts = _Column(held + parts)
        facts = [
            space for space, kind in zip(self._namespaces, self._types, strict=True) if kind is not torch.nn.Linear
        ]
        self._attributes = _Column(
            [(space, name, value) for space in facts for name, value in space.items() if _is_fact(name)]
            + [(space, "training", False) for space in facts]  # dropout
        )
        self._held = [tensor.detach() for tensor in self._tensors]  # so that nothing else can come to lie there
        self._sizes = array("Q", [x.nbytes if _is_dense(x) and x.is_cpu else 0 for x in self._tensors])
        self._places = self._find_places()
        self._sample = sample_of(self._places[1], self._sizes)
        self._config, self._settings = model.config, copy.deepcopy(_settings(model.config))
        if not self._has_settings():
            raise UnsupportedError("the config holds something that does not equal a copy of it, such as a tensor")
        self._classes = list(dict.fromkeys([type(model), *self._types]))
        own = [k for k in dict.fromkeys(base for kind in self._classes for base in kind.__mro__) if _is_of_models(k)]
        files = [vars(sys.modules[name]) for name in dict.fromkeys(kind.__module__ for kind in own)]
        self._functions = _Column([(names, name, f) for names in files for name, f in names.items() if callable(f)])
        methods = [(vars(kind), name, method) for kind in own for name, method in vars(kind).items()]
        self._methods = _Column(methods, types.MappingProxyType.get)
        self._called, self._attention = list(map(_CALLED, self._classes)), _attention()
        self._added = self._find_added()

    def weights_differ(self, model: PreTrainedModel) -> bool:
        """Whether a parameter, a buffer or a module was replaced or changed.

        Not seen is a change by `.data`, through numpy or another tensor that shares the memory, where it leaves eight
        words of each tensor as they were, evenly spread; and where a tensor is not dense, any such change.
        """
        return (
            not all(map(operator.is_, map(vars(model).get, _PARTS), self._own_parts))
            or not all(map(operator.is_, map(vars, self._below), self._namespaces))
            or not self._parts.is_same()
            or self._find_places() != self._places
            or sample_of(self._places[1], self._sizes) != self._sample
        )

    def difference(self, model: PreTrainedModel) -> str | None:
        """What else of the model was changed, or None."""
        is_of_its_class = type(model) is self._type and list(map(type, self._below)) == self._types
        if not (is_of_its_class and self._attributes.is_same()):
            return "an attribute or the class of a module was changed"
        if model.config is not self._config or not self._has_settings():
            return "its config was changed"
        is_code_of_then = list(map(_CALLED, self._classes)) == self._called and self._functions.is_same()
        if not (is_code_of_then and self._methods.is_same() and _attention() == self._attention):
            return "code of transformers was replaced"
        if modules._global_forward_hooks or modules._global_forward_pre_hooks:
            return HOOKED
        if (added := self._find_added()) != self._added:
            if any(map(calls_more, self._below)):
                return HOOKED
            self._added = added  # what transformers leaves behind where it records outputs
        return None

    def _find_added(self) -> list[Any]:
        """Hooks and forwards of modules below the model, around whose own forward its own hooks are called, and how
        many names each module has."""
        spaces = self._namespaces
        hooks = itertools.chain(map(_HOOKS, spaces), map(_PRE_HOOKS, spaces))
        forwards = map(_GET, spaces, itertools.repeat("forward"))
        return [*itertools.chain.from_iterable(map(dict.values, hooks)), *forwards, *map(len, spaces)]

    def _find_places(self) -> tuple[list[int], array[int]]:
        """Versions of the tensors, and where they lie."""
        versions = list(map(operator.attrgetter("_version"), self._tensors))
        return versions, array("Q", map(Tensor.data_ptr, self._tensors))

    def _has_settings(self) -> bool:
        try:
            return _settings(self._config) == self._settings
        except (RuntimeError, ValueError):  # of tensors and arrays, which have no one truth value
            return False


class _Column:
    """Where things are, under which names, and which they are."""

    def __init__(self, entries: Sequence[tuple[Mapping[str, Any], str, Any]], get: Callable[..., Any] = _GET) -> None:
        self._holders, self._names, self._things = (tuple(each[i] for each in entries) for i in range(3))
        self._get = get

    def is_same(self) -> bool:
        found = map(self._get, self._holders, self._names, itertools.repeat(None))
        return all(map(operator.is_, found, self._things))


def _attention() -> tuple[Any, Any]:
    return ALL_ATTENTION_FUNCTIONS.get(ATTENTION_NAME), ALL_MASK_ATTENTION_FUNCTIONS.get(ATTENTION_NAME)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.dim() == 2 and tensor.t().is_contiguous())


def _is_of_models(kind: type) -> bool:
    return kind.__module__.startswith(("transformers.models.", "transformers.activations"))


def _is_fact(name: str) -> bool:
    """Whether an attribute of a module may tell what it computes."""
    return name not in _OF_ANY_MODULE and name not in _NOT_COMPUTED and not name.startswith("_")


def _settings(config: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if name[0] != "_" and name not in _OF_CALLS}
