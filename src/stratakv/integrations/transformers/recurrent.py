"""Batch verbs for transformers' own recurrent and convolution states, which lack some of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from stratakv.errors import StateError
from stratakv.integrations.transformers.compat import LinearAttentionCacheLayerMixin

STATE_NAMES = ("conv_states", "recurrent_states")


def has_states(layer: Any) -> bool:
    """Whether `layer` carries recurrent or convolution states."""
    return LinearAttentionCacheLayerMixin is not None and isinstance(layer, LinearAttentionCacheLayerMixin)


def map_states(layer: Any, function: Callable[[Tensor], Tensor]) -> None:
    """Replace every state `[batch, ...]` of `layer` by `function` of it."""
    for name in STATE_NAMES:
        states = getattr(layer, name)
        for index, state in states.items():
            if state is not None:
                states[index] = function(state)


def reset_states(layer: Any) -> None:
    """Forget the states, and with them the batch size that they were made for."""
    for name in STATE_NAMES:
        states = getattr(layer, name)
        for index in states:
            states[index] = None
            getattr(layer, f"is_{name}_initialized")[index] = False
    for index in layer.has_previous_state:
        layer.has_previous_state[index] = False


def states_of(layer: Any) -> dict[str, Any]:
    """A copy of all that the states of `layer` consist of."""
    names = (*STATE_NAMES, *(f"is_{name}_initialized" for name in STATE_NAMES), "has_previous_state")
    copied: dict[str, Any] = {}
    for name in names:
        copied[name] = {
            index: state.clone() if isinstance(state, Tensor) else state
            for index, state in getattr(layer, name).items()
        }
    return copied


def restore_states(layer: Any, copied: dict[str, Any]) -> None:
    """Put back what `states_of` gave; `copied` stays good for another time."""
    for name, states in copied.items():
        target = getattr(layer, name)
        for index, state in states.items():
            target[index] = state.clone() if isinstance(state, Tensor) else state


def check_croppable(layer: Any, n_remove: int) -> None:
    """Raise StateError unless the last `n_remove` tokens can be taken back out of the states."""
    if any(layer.is_recurrent_states_initialized.values()):
        raise StateError("a recurrent state cannot be cut back: it holds no single tokens; use checkpoint and rollback")
    if not layer.record_past:
        raise StateError(
            f"{n_remove} tokens cannot be taken back out of a convolution state unless activate_past_recording() was "
            "called before they were fed"
        )


def crop_states(layer: Any, n_remove: int) -> None:
    """Take the last `n_remove` tokens back out of the convolution states, and drop what no later step needs."""
    for index, state in layer.conv_states.items():
        if state is not None:
            stop = state.shape[-1] - n_remove
            layer.conv_states[index] = state[..., max(stop - layer.conv_kernel_size[index], 0) : stop]
