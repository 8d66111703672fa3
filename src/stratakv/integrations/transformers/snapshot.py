"""Whether a model is still what it was: its parts, weights, attributes, config, code and hooks."""

from __future__ import annotations

import copy
import itertools
import operator
import sys
from array import array
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as modules

from stratakv.extension import sample_of
from stratakv.integrations.transformers.compat import PreTrainedModel
from stratakv.models.native import calls_more

HOOKED = "a module has a hook or a forward of its own"
_NOT_COMPUTED = {"generation_config", "name_or_path", "gradient_checkpointing"}
_OF_CALLS = {"use_cache", "return_dict", "output_hidden_states", "output_attentions"}  # which are looked at in each
_FORWARD = operator.attrgetter("forward")
_OF_ANY_MODULE = vars(torch.nn.Module()).keys()


class Snapshot:
    """What a model consists of. It is not held, but its weights of then are.

    Whoever asks does so before each step, and all of this lies elsewhere in memory than what kernels use: loops are in
    C, and attributes of torch's own modules, such as a linear layer's, are not looked at.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        everything = list(model.modules())
        below = everything[1:]
        own = [module for module in below if not _is_torchs(type(module))]
        parts = [
            (held, name, part)
            for module in everything
            for held in (module._modules, module._parameters, module._buffers)
            for name, part in held.items()
        ]
        self._parts = _transposed(parts)
        self._attributes = _transposed(
            [(vars(m), name, value) for m in own for name, value in vars(m).items() if _is_fact(name)]
        )
        self._tensors = [part for _, _, part in parts if isinstance(part, Tensor)]
        self._versioned = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._held = [tensor.detach() for tensor in self._tensors]  # so that nothing else can come to lie there
        self._sizes = array("Q", [x.nbytes if x.is_contiguous() and x.is_cpu else 0 for x in self._tensors])
        self._places = self._find_places()
        self._sample = sample_of(self._places[1], self._sizes)
        self._below, self._types = below, list(map(type, below))
        self._config, self._settings = model.config, copy.deepcopy(_settings(model.config))
        classes = list(dict.fromkeys([type(model), *self._types]))
        names = dict.fromkeys(kind.__module__ for kind in classes if not _is_torchs(kind))
        files = [vars(sys.modules[name]) for name in names]
        functions = [(names, name, f) for names in files for name, f in names.items() if callable(f)]
        self._functions = _transposed(functions)
        self._classes, self._forwards = classes, list(map(_FORWARD, classes))
        # Those of the model itself are called around its forward.
        self._hooks = [each for m in below for each in (m._forward_hooks, m._forward_pre_hooks)]
        self._namespaces = list(map(vars, below))
        self._n_hooks, self._n_names = self._count()

    def weights_differ(self) -> bool:
        """Whether a parameter, a buffer or a module was replaced or changed.

        Not seen is a change by `.data` or through numpy that leaves eight words of each tensor as they were, evenly
        spread; and where a tensor is not dense, any such change.
        """
        return (
            not _are_same(self._parts)
            or self._find_places() != self._places
            or sample_of(self._places[1], self._sizes) != self._sample
        )

    def difference(self, model: PreTrainedModel) -> str | None:
        """What else of the model was changed, or None."""
        if not _are_same(self._attributes) or list(map(type, self._below)) != self._types:
            return "an attribute or the class of a module was changed"
        if model.config is not self._config or _settings(self._config) != self._settings:
            return "its config was changed"
        if list(map(_FORWARD, self._classes)) != self._forwards or not _are_same(self._functions):
            return "code of transformers was replaced"
        if modules._global_forward_hooks or modules._global_forward_pre_hooks:
            return HOOKED
        if self._count() != (self._n_hooks, self._n_names):
            if any(map(calls_more, self._below)):
                return HOOKED
            self._n_hooks, self._n_names = self._count()  # what transformers leaves behind where it records outputs
        return None

    def _count(self) -> tuple[list[int], list[int]]:
        return list(map(len, self._hooks)), list(map(len, self._namespaces))

    def _find_places(self) -> tuple[list[int], array[int]]:
        """Versions of the tensors, and where they lie."""
        versions = list(map(operator.attrgetter("_version"), self._versioned))
        return versions, array("Q", map(Tensor.data_ptr, self._tensors))


_Column = tuple[tuple[dict[str, Any], ...], tuple[str, ...], tuple[Any, ...]]


def _transposed(entries: list[tuple[dict[str, Any], str, Any]]) -> _Column:
    """Where things are, under which names, and which they are."""
    holders, names, things = zip(*entries, strict=True) if entries else ((), (), ())
    return holders, names, things


def _are_same(column: _Column) -> bool:
    holders, names, things = column
    return all(map(operator.is_, map(dict.get, holders, names, itertools.repeat(None)), things))


def _is_torchs(kind: type) -> bool:
    return kind.__module__.startswith("torch.")


def _is_fact(name: str) -> bool:
    """Whether an attribute of a module may tell what it computes."""
    if name == "training":  # dropout
        return True
    return name not in _OF_ANY_MODULE and name not in _NOT_COMPUTED and not name.startswith("_")


def _settings(config: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if name[0] != "_" and name not in _OF_CALLS}
