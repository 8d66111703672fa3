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
    cannot. With the last layer's rows the cache grows by the new tokens: states that are fed before that are ahead of
    the cache while a forward runs, states that are fed after it are behind. Where the last layer with rows has a state
    too, which of the two it is shows in its first forward.

    Args:
        layers: the layers with states.
        last_row_layer: the last layer with rows.
    """

    def __init__(self, layers: Iterable[int], last_row_layer: int) -> None:
        self.layers = tuple(layers)
        self.last_row_layer = last_row_layer
        self._fed: dict[tuple[str, int, int], int] = {}
        self._start = 0
        self._rows_first: bool | None = None  # in the last layer with rows

    def note_rows(self, layer: int) -> None:
        """`layer` has stored the rows of a forward."""
        if layer == self.last_row_layer and self._rows_first is None:
            self._rows_first = True

    def note(self, verb: str, layer: int, index: int, seen_tokens: int) -> None:
        """A state is about to be fed with `verb`, while the cache has `seen_tokens`.

        Raises:
            StateError: it was fed at that length before. Nothing was changed.
        """
        if self._fed.get((verb, layer, index)) == seen_tokens:
            raise StateError(STOPPED)
        self._fed[verb, layer, index] = seen_tokens
        if layer == self.last_row_layer and self._rows_first is None:
            self._rows_first = False

    def check(self, seen_tokens: int, *, between_forwards: bool = True) -> None:
        """Raise StateError where some states have been fed tokens that others, or the rows, have not.

        At a forward's first rows (not `between_forwards`) the layers before them have rightly been fed already.
        """
        if not self._fed:
            return
        for layer in self.layers:
            fed = [at for (_, each, _), at in self._fed.items() if each == layer]
            is_last = layer == self.last_row_layer
            if layer > self.last_row_layer or (is_last and self._rows_first):
                # The latest counts: verbs differ between a first and a later forward.
                is_uneven = max(fed, default=self._start) != seen_tokens
            else:
                # Some verbs of the last layer may come before its rows and others after: all before, then it is ahead.
                is_uneven = between_forwards and bool(fed) and (min(fed) if is_last else max(fed)) == seen_tokens
            if is_uneven:
                raise StateError(STOPPED)

    def restart(self, seen_tokens: int) -> None:
        """All states are as after `seen_tokens` again."""
        self._fed.clear()
        self._start = seen_tokens
        self._rows_first = None

    def copy(self) -> FeedLog:
        """The same log for a copy of the states."""
        twin = FeedLog(self.layers, self.last_row_layer)
        twin._fed.update(self._fed)
        twin._start = self._start
        twin._rows_first = self._rows_first
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
