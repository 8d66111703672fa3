"""The layers that transformers sees in our cache: thin handles on one layer's rows."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stratakv.errors import StateError, UnsupportedError
from stratakv.integrations.transformers.compat import CacheLayerMixin, LinearAttentionLayer, query_length

if TYPE_CHECKING:
    from stratakv.integrations.transformers.state import CacheState


class KVLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """One attention layer of a `KVCache`. Holds no bytes; the cache owns the handle, so the handle refers to it weakly.

    Args:
        cache: the owner.
        index: the model's layer index.
        window: keys that a query of this layer may see, itself included; None: all.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: CacheState, index: int, window: int | None) -> None:
        # The parent's constructor would set `keys` and `values`, which are computed here.
        self._cache = weakref.ref(cache)
        self.index = index
        self.window = window

    @property
    def cache(self) -> CacheState:
        """The owner."""
        cache = self._cache()
        if cache is None:
            raise StateError("the cache that this layer belongs to is gone")
        return cache

    @property
    def is_sliding(self) -> bool:
        """Whether the model itself limits what this layer sees."""
        return self.window is not None

    @property
    def sliding_window(self) -> int | None:
        """The model's own window, under transformers' name."""
        return self.window

    @property
    def is_initialized(self) -> bool:
        """Whether the layer holds rows."""
        return self.get_seq_length() > 0

    @property
    def keys(self) -> Tensor | None:
        """`[batch, n_kv_heads, n_rows, k_dim]`, gathered for this call, or None before the first update."""
        return self._gathered(0)

    @property
    def values(self) -> Tensor | None:
        """`[batch, n_kv_heads, n_rows, v_dim]`, gathered for this call, or None before the first update."""
        return self._gathered(1)

    @property
    def record_past(self) -> bool:
        """Whether rows that leave a window are kept until the next crop. One state for the whole cache."""
        return self.cache.batch.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.cache.batch.recording = value

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: memory comes with the first update."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new rows through the cache."""
        rows: tuple[Tensor, Tensor] = self.cache.update(key_states, value_states, self.index, *args, **kwargs)
        return rows

    def get_seq_length(self) -> int:
        """Tokens seen by this layer."""
        return self.cache.batch.layer_length(self.index)

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """(columns, position of the first column) of the mask for `query` new tokens."""
        return self.cache.mask_sizes(self.index, query_length(query))

    def get_max_length(self) -> int:
        """The window, or the capacity, or -1 for no limit."""
        return self.window or self.cache.capacity or -1

    def get_max_cache_shape(self) -> int:
        """`get_max_length` under its older name."""
        return self.get_max_length()

    def reset(self) -> None:
        """Refused: a layer has no length of its own."""
        self._refuse("reset")

    def crop(self, tokens: int) -> None:
        """Refused: a layer has no length of its own."""
        self._refuse("crop")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: a layer has no batch of its own."""
        self._refuse("reorder_cache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: a layer has no batch of its own."""
        self._refuse("batch_repeat_interleave")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused: a layer has no batch of its own."""
        self._refuse("batch_select_indices")

    def activate_past_recording(self) -> None:
        """Keep rows that leave a window until the next crop."""
        self.record_past = True

    def rebound(self, cache: CacheState) -> KVLayer:
        """The same handle on another cache."""
        return type(self)(cache, self.index, self.window)

    def _gathered(self, which: int) -> Tensor | None:
        cache = self.cache
        if not self.is_initialized:
            return None
        return cache.batch.view(self.index).gather(cache.dtypes[self.index])[which]

    def _refuse(self, verb: str) -> None:
        raise UnsupportedError(
            f"{verb} is a verb of the whole cache: its layers share block tables. Call cache.{verb}(...)"
        )


if LinearAttentionLayer is not None:

    class HybridLayer(KVLayer, LinearAttentionLayer):  # type: ignore[misc]  # transformers is untyped
        """A layer with attention and a recurrent state. The state is transformers' own; the rows are ours."""

        def __init__(self, cache: CacheState, index: int, window: int | None, number_of_states: int = 1) -> None:
            LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
            KVLayer.__init__(self, cache, index, window)

        def __setattr__(self, name: str, value: Any) -> None:
            # The recurrent half's constructor says that nothing is being recorded; before the owner is known that
            # is true without being stored, and afterwards both halves have one state.
            if name == "record_past" and "_cache" not in self.__dict__:
                return
            super().__setattr__(name, value)

        def lazy_initialization(self, *args: Tensor, **kwargs: Any) -> None:
            """For the recurrent state only."""
            if kwargs:
                LinearAttentionLayer.lazy_initialization(self, **kwargs)

        def rebound(self, cache: CacheState) -> HybridLayer:
            """The same rows' handle on another cache, with a copy of the recurrent state."""
            twin = HybridLayer(cache, self.index, self.window, self.number_of_states)
            for name, value in self.__dict__.items():
                if name not in ("_cache", "index", "window"):
                    twin.__dict__[name] = _copied(value)
            return twin

else:
    HybridLayer = None  # type: ignore[misc,assignment]  # no layer of that kind exists in this version


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return {key: _copied(each) for key, each in value.items()} if isinstance(value, dict) else value
