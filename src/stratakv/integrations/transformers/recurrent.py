"""Batch verbs for transformers' own recurrent and convolution states, which lack some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from stratakv.errors import StateError
from stratakv.integrations.transformers.compat import LinearAttentionCacheLayerMixin

STATE_NAMES = ("conv_states", "recurrent_states")

STOPPED = (
    "the last forward stopped half way, after it had changed recurrent states, which cannot be taken back; call "
    "rollback(checkpoint) or reset()"
)


class FeedLog:
    """How long the cache was when each state was last fed, which shows a forward that stopped half way.

    A forward reaches each state at most once with each verb. Rows of a stopped forward can be taken back, states
    cannot.

    Args:
        layers: the layers with states.
        last_row_layer: the last layer with rows. When it has stored its rows, the cache is longer by the new tokens.
    """

    def __init__(self, layers: Iterable[int], last_row_layer: int) -> None:
        self.layers = tuple(layers)
        self.last_row_layer = last_row_layer
        self._fed: dict[tuple[str, int, int], int] = {}
        self._start = 0

    def note(self, verb: str, layer: int, index: int, seen_tokens: int) -> None:
        """A state is about to be fed with `verb`, while the cache has `seen_tokens`.

        Raises:
            StateError: it was fed at that length before. Nothing was changed.
        """
        if self._fed.get((verb, layer, index)) == seen_tokens:
            raise StateError(STOPPED)
        self._fed[verb, layer, index] = seen_tokens

    def check(self, seen_tokens: int, *, between_forwards: bool = True) -> None:
        """Raise StateError where some states have been fed tokens that others, or the rows, have not.

        At a forward's first rows (not `between_forwards`) the layers before them have rightly been fed already.
        """
        if not self._fed:
            return
        latest = dict.fromkeys(self.layers, -1)  # verbs differ between a first and a later forward
        for (_, layer, _), fed in self._fed.items():
            latest[layer] = max(latest[layer], fed)
        for layer, fed in latest.items():
            is_behind = layer > self.last_row_layer and max(fed, self._start) != seen_tokens
            is_ahead = layer <= self.last_row_layer and fed == seen_tokens and between_forwards
            if is_behind or is_ahead:
                raise StateError(STOPPED)

    def restart(self, seen_tokens: int) -> None:
        """All states are as after `seen_tokens` again."""
        self._fed.clear()
        self._start = seen_tokens

    def copy(self) -> FeedLog:
        """The same log for a copy of the states."""
        twin = FeedLog(self.layers, self.last_row_layer)
        twin._fed.update(self._fed)
        twin._start = self._start
        return twin


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


def nbytes(layer: Any) -> int:
    """Bytes of the states."""
    states = [state for name in STATE_NAMES for state in getattr(layer, name).values() if state is not None]
    return sum(state.numel() * state.element_size() for state in states)


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
