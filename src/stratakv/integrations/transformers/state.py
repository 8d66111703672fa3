"""What a `KVCache` holds, and how it goes back: everything that does not depend on how transformers feeds it."""

from __future__ import annotations

import copy
import weakref
from typing import Any, Self

import torch
from torch import Tensor

from stratakv.blocks.audit import MemoryUsage
from stratakv.blocks.batch import SequenceBatch
from stratakv.blocks.interrupts import uninterrupted
from stratakv.errors import ConfigurationError, StateError, UnsupportedError
from stratakv.integrations.transformers import recurrent
from stratakv.integrations.transformers.arguments import whole_numbers
from stratakv.integrations.transformers.checkpoint import CacheCheckpoint
from stratakv.integrations.transformers.compat import (
    Cache,
    DynamicLayer,
    PreTrainedModel,
    positive_crop_keeps,
    states_go_through_cache,
)
from stratakv.integrations.transformers.geometry import attention_config, attention_window
from stratakv.integrations.transformers.layers import HybridLayer, KVLayer
from stratakv.integrations.transformers.tickets import Epoch
from stratakv.plan import KeepPlan
from stratakv.spec import CacheSpec
from stratakv.units import whole

ATTENTION_NAME = "stratakv"
"""The name under which our attention and mask functions are registered with transformers."""


class CacheState(Cache):  # type: ignore[misc]  # transformers is untyped
    """Rows of a batch of sequences and recurrent states beside them, that grow and go back together.

    Args:
        model: the model that the cache is for.
        batch: the rows.
        layers: transformers' own layers, in order; those with keys and values are replaced by handles on our rows.
        attachable: whether our attention function may serve these rows.
    """

    def __init__(self, model: PreTrainedModel, batch: SequenceBatch, layers: list[Any], *, attachable: bool) -> None:
        self.batch = batch
        self._config = attention_config(model)
        self._model = weakref.ref(model)
        self._attachable = attachable
        self._epoch = Epoch()
        self._fed = recurrent.FeedLog(
            (i for i, layer in enumerate(layers) if recurrent.has_states(layer)),
            last_row_layer=max(i for i, layer in enumerate(layers) if isinstance(layer, DynamicLayer)),
        )
        self.dtypes: dict[int, torch.dtype] = {}  # what each layer's attention computes in, from its first rows
        self.token_ids: tuple[tuple[int, ...], ...] | None = None
        super().__init__(layers=[self._handle(index, layer) for index, layer in enumerate(layers)])

    # What it holds

    @property
    def spec(self) -> CacheSpec:
        """Layers, groups and pages."""
        return self.batch.memory.spec

    @property
    def capacity(self) -> int | None:
        """Tokens a sequence can hold, or None for no limit."""
        return self.spec.capacity

    @property
    def nbytes(self) -> int:
        """Bytes really held, by this cache and its forks together."""
        states = sum(recurrent.nbytes(layer) for layer in self._recurrent_layers())
        return self.batch.memory.nbytes + states

    @property
    def seen_tokens(self) -> int:
        """Positions: tokens that were fed and not taken back."""
        return self.batch.seen_tokens

    @property
    def stored_tokens(self) -> int:
        """Rows stored for each sequence, in the layers that store most."""
        return self.batch.stored_tokens

    @property
    def batch_size(self) -> int:
        """Sequences held, or -1 while empty."""
        return len(self.batch.sequences) or -1

    @property
    def is_attached(self) -> bool:
        """Whether the model computes attention over this cache with our own function."""
        return self._attachable and self._config._attn_implementation == ATTENTION_NAME

    def check(self) -> MemoryUsage:
        """Verify the books: free + held + cached = total, every reference count, every length.

        Raises:
            InvariantError: they do not add up.
        """
        return self.batch.memory.check()

    @property
    def model(self) -> PreTrainedModel:
        """The model that this cache was made for."""
        model = self._model()
        if model is None:
            raise StateError("the model that this cache was made for is gone")
        return model

    def mask_sizes(self, layer_idx: int, n_queries: int) -> tuple[int, int]:
        """As `get_mask_sizes`, for an attention layer. Columns are consecutive positions, whatever rows are stored."""
        seen = self.batch.layer_length(layer_idx)
        window = self.layers[layer_idx].window
        visible = seen if window is None else min(seen, window - 1)
        return visible + n_queries, seen - visible

    # transformers' verbs for states. Models change what the getters give in place, so a getter counts as feeding.

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A convolution state of one layer, or None before its first tokens.

        Raises:
            StateError: the last forward stopped after it had come here. Nothing was changed.
        """
        state: Tensor | None = self._state("get_conv_state", layer_idx, state_idx)
        return state

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Feed a convolution state of one layer. Raises as `get_conv_state`."""
        fed: Tensor = self._state("update_conv_state", layer_idx, state_idx, conv_states, **kwargs)
        return fed

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """A recurrent state of one layer, or None before its first tokens. Raises as `get_conv_state`."""
        state: Tensor | None = self._state("get_recurrent_state", layer_idx, state_idx)
        return state

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Replace a recurrent state of one layer. Raises as `get_conv_state`."""
        fed: Tensor = self._state("update_recurrent_state", layer_idx, state_idx, recurrent_states, **kwargs)
        return fed

    # Going back

    @uninterrupted
    def truncate(self, n_tokens: int) -> None:
        """Keep the first `n_tokens` tokens. What an incomplete forward left is taken back first.

        Raises:
            StateError: rows that a run of that length would still see are gone, or a recurrent state cannot go back.
        """
        n_tokens = whole("the number of tokens to keep", n_tokens)
        n_remove = self.batch.seen_tokens - n_tokens
        self._fed.check(self.batch.seen_tokens)
        if n_remove > 0:
            for layer in self._recurrent_layers():
                recurrent.check_croppable(layer, n_remove)
        self._epoch.advance()
        self.batch.truncate(n_tokens)
        self._fed.restart(n_tokens)
        for layer in self._recurrent_layers():
            if layer.record_past:
                recurrent.crop_states(layer, n_remove)
        if self.token_ids is not None:
            self.token_ids = tuple(ids[:n_tokens] for ids in self.token_ids)

    @uninterrupted
    def crop(self, tokens: int = 0) -> None:
        """transformers' verb: 0 removes nothing, -k removes the last k tokens (all, where there are fewer).

        A positive k keeps k tokens where the installed transformers means that (below 5.15). With past recording on,
        rows that left a window are let go now.

        Raises:
            ConfigurationError: a positive k in a version where that is an error.
            StateError: as `truncate`.
        """
        tokens = whole("tokens", tokens)  # assisted decoding counts them on the model's device
        if tokens > 0 and not positive_crop_keeps:
            raise ConfigurationError(
                f"crop takes 0 or -k to remove k tokens, got {tokens}; use truncate({tokens}) to keep"
            )
        target = min(tokens, self.seen_tokens) if tokens > 0 else max(self.seen_tokens + tokens, 0)
        self.truncate(target)
        if self.batch.recording:
            self.batch.evict()

    def activate_past_recording(self) -> None:
        """Keep rows that leave a window until the next `crop`, so that drafts can be taken back."""
        self.batch.recording = True
        for layer in self._recurrent_layers():
            layer.record_past = True

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether rows that leave a window are kept until the next `crop`."""
        return bool(getattr(self.layers[layer_idx], "record_past", False))

    @uninterrupted
    def checkpoint(self) -> CacheCheckpoint:
        """A state to come back to with `rollback`, as often as wanted.

        It holds the blocks of now: the next step copies each sequence's partial last block, once.

        Raises:
            StateError: the last forward stopped half way.
        """
        self._fed.check(self.batch.seen_tokens)
        return CacheCheckpoint(self.batch.checkpoint(), self.layers, self.token_ids)

    @uninterrupted
    def rollback(self, mark: CacheCheckpoint) -> None:
        """Return to `mark`.

        Raises:
            StateError: it was released, or made from another cache. Nothing was changed.
        """
        self.batch.rollback(mark.rows)
        self._epoch.advance()
        self._fed.restart(mark.seen_tokens)
        for index, states in mark.states.items():
            recurrent.restore_states(self.layers[index], states)
        self.token_ids = mark.token_ids

    @uninterrupted
    def reset(self) -> None:
        """Forget everything, the batch size too."""
        self._epoch.advance()
        self._fed.restart(0)
        self.batch.reset()
        for layer in self._recurrent_layers():
            recurrent.reset_states(layer)
        self.token_ids = None

    @uninterrupted
    def fork(self) -> Self:
        """A cache of its own that shares all blocks with this one; either copies a block before it writes into it.

        Raises:
            StateError: the last forward stopped half way.
        """
        self._fed.check(self.batch.seen_tokens)
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__.update(self.__dict__)
        twin.batch = self.batch.fork()
        twin._epoch = Epoch()
        twin._fed = self._fed.copy()
        twin.dtypes = dict(self.dtypes)
        twin.layers = [
            layer.rebound(twin) if isinstance(layer, KVLayer) else copy.deepcopy(layer) for layer in self.layers
        ]
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.fork()

    def __reduce__(self) -> Any:
        raise UnsupportedError("a KVCache is not pickled; use cache.save(path) and KVCache.load(path, model)")

    @uninterrupted
    def compact(self, plan: KeepPlan) -> None:
        """Keep only the rows of `plan`, in the layers that have no window of the model's own.

        Raises:
            UnsupportedError: the model is not attached, so its mask would show the dropped rows.
            ConfigurationError: positions that are not stored. Nothing was changed.
        """
        if not self.is_attached:
            raise UnsupportedError("the model's mask would show the dropped rows; call stratakv.attach(model) first")
        self.batch.compact(plan)
        self._epoch.advance()

    # The batch

    @uninterrupted
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence `beam_idx[i]` become sequence i. Copies nothing."""
        self.batch_select_indices(beam_idx)

    @uninterrupted
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`, in that order."""
        chosen = self.checked_selection(indices)
        if not len(chosen):
            self.reset()
            return
        self._epoch.advance()
        if self.batch.sequences:
            self.batch.select(chosen.tolist())
        for layer in self._recurrent_layers():
            recurrent.map_states(layer, lambda state: state.index_select(0, chosen.to(state.device)))
        if self.token_ids is not None:
            self.token_ids = tuple(self.token_ids[i] for i in chosen.tolist())

    def checked_selection(self, indices: Tensor) -> Tensor:
        """`indices`, or a mask of all sequences, as int64 indices from 0 on.

        Raises:
            ConfigurationError: there is no such sequence. StateError: the last forward stopped half way.
        """
        self.batch.check_between_steps()
        n = len(self.batch.sequences)
        if str(getattr(indices, "dtype", "")) in ("bool", "torch.bool"):
            mask = torch.as_tensor(indices)
            if mask.shape != ((n or mask.numel()),):
                raise ConfigurationError(f"a mask of {n} sequences is [{n}], got the shape {tuple(mask.shape)}")
            indices = mask.nonzero().flatten()
        chosen = whole_numbers("indices", indices)
        if chosen.dim() != 1:
            raise ConfigurationError(f"indices of sequences are a list, got the shape {tuple(chosen.shape)}")
        if n and len(chosen) and not (-n <= int(chosen.min()) and int(chosen.max()) < n):
            raise ConfigurationError(f"there are {n} sequences, got indices {chosen.tolist()}")
        return chosen % n if n else chosen

    @uninterrupted
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every sequence `repeats` times, side by side. Copies nothing.

        Raises:
            ConfigurationError: `repeats` is below 1.
        """
        repeats = whole("repeats", repeats)
        if repeats < 1:
            raise ConfigurationError(f"repeats must be at least 1, got {repeats}")
        n = len(self.batch.sequences)
        if n:
            self.batch_select_indices(torch.arange(n, device="cpu").repeat_interleave(repeats))

    def _state(self, verb: str, layer: int, state: int, *tensors: Tensor, **kwargs: Any) -> Any:
        if states_go_through_cache:
            self._fed.note(verb, layer, state, self.batch.seen_tokens)
        return getattr(super(), verb)(*tensors, layer, state, **kwargs)

    def _handle(self, index: int, layer: Any) -> Any:
        if not isinstance(layer, DynamicLayer):
            return copy.deepcopy(layer)
        window = attention_window(layer)
        if recurrent.has_states(layer):
            return HybridLayer(self, index, window, layer.number_of_states)
        return KVLayer(self, index, window)

    def _recurrent_layers(self) -> list[Any]:
        return [layer for layer in self.layers if recurrent.has_states(layer)]
