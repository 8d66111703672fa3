"""`KVCache`: our pages behind transformers' cache interface."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratakv.blocks.batch import Checkpoint, SequenceBatch
from stratakv.blocks.geometry import build_spec
from stratakv.blocks.memory import Memory, MemoryUsage
from stratakv.codecs import codec_names
from stratakv.errors import ConfigurationError, FingerprintError, StateError, UnsupportedError
from stratakv.integrations.transformers import recurrent
from stratakv.integrations.transformers.compat import (
    Cache,
    DynamicLayer,
    PreTrainedModel,
    positive_crop_keeps,
    query_length,
)
from stratakv.integrations.transformers.geometry import attention_config, attention_window, layer_specs, template_layers
from stratakv.integrations.transformers.layers import HybridLayer, KVLayer
from stratakv.integrations.transformers.tickets import Epoch, issue
from stratakv.plan import KeepPlan
from stratakv.policies import RetentionPolicy
from stratakv.spec import CacheSpec, LayerSpec
from stratakv.units import parse_bytes

ATTENTION_NAME = "stratakv"
"""The name under which our attention and mask functions are registered with transformers."""

FORMAT_OF_DTYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class KVCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """Keys and values of past tokens, in pages. Made with `KVCache.for_model`; see there.

    Two numbers are kept apart: `seen_tokens` are positions, `stored_tokens` are rows. A forward through a model is
    one transaction: room is made in all layers or in none, and `seen_tokens` advances when the last layer has stored
    its rows. A forward that stopped half way leaves the cache refusing the next one until `truncate(seen_tokens)`,
    `rollback` or `reset` took back what it left.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: SequenceBatch,
        layers: list[Any],
        *,
        attachable: bool,
        needs_wrapper: bool = False,
    ) -> None:
        self.batch = batch
        self._config = attention_config(model)
        self._model = weakref.ref(model)
        self._attachable = attachable
        self.needs_wrapper = needs_wrapper
        self.announced = False
        """Whether the wrapper was asked for a length since the last forward, as every forward through it does first."""
        self._epoch = Epoch()
        self.dtypes: dict[int, torch.dtype] = {}  # what each layer's attention computes in, from its first rows
        self.token_ids: tuple[tuple[int, ...], ...] | None = None
        super().__init__(layers=[self._handle(index, layer) for index, layer in enumerate(layers)])

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        *,
        format: str | None = None,  # the public name; a builtin is hidden in this one function
        k_format: str | None = None,
        v_format: str | None = None,
        layout: str = "paged",
        block_tokens: int = 64,
        capacity: int | None = None,
        policy: RetentionPolicy | None = None,
        memory: int | str | None = None,
        poison: bool = False,
    ) -> Any:
        """A cache for `model`, to be passed to `generate` or `forward` as `cache=` (`past_key_values=` before).

        Args:
            model: a transformers model with a decoder.
            format: how keys and values are stored: `fp32`, `bf16`, `fp16`. None: as the model computes, exactly.
            k_format: the same for keys alone.
            v_format: the same for values alone.
            layout: `paged` (slabs of blocks; growth copies nothing), `contiguous` (preallocated, takes `capacity`) or
                `growing` (one stretch a sequence, doubled when full).
            block_tokens: rows in a block, for `paged`.
            capacity: tokens a sequence can hold, for `contiguous`.
            policy: which tokens stay. Needs `stratakv.attach(model)` first, since no mask of the model expresses it.
            memory: most bytes to hold, as a number or like `"2GiB"`. None: no limit.
            poison: overwrite freed blocks with NaN, to make stale reads visible. For tests.

        Returns:
            A `KVCache`; for an encoder-decoder an `EncoderDecoderKVCache`.

        Raises:
            ConfigurationError: an argument is out of range.
            UnsupportedError: the model, or the combination, cannot be served; the message says why.
        """
        takes_cache = getattr(type(model), "_supports_default_dynamic_cache", None)
        if takes_cache is not None and not takes_cache():
            raise UnsupportedError(f"{type(model).__name__} accepts only a cache class of its own")
        layers = template_layers(model.config)
        if not any(isinstance(layer, DynamicLayer) for layer in layers):
            raise UnsupportedError(f"{type(model).__name__} has no attention layers that cache keys and values")
        own = FORMAT_OF_DTYPE.get(model.dtype)
        if format is None and own is None and (k_format is None or v_format is None):
            raise UnsupportedError(f"no format stores {model.dtype} exactly; choose one of {', '.join(codec_names())}")
        chosen = format or own
        options: dict[str, Any] = {
            "k_format": k_format or chosen,
            "v_format": v_format or chosen,
            "block_tokens": block_tokens,
        }
        specs = layer_specs(model.config, layers)
        spec = build_spec(specs, **options, layout=layout, capacity=capacity, policy=policy)
        max_bytes = None if memory is None else parse_bytes(memory)
        is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))

        def cache(spec: CacheSpec, policy: RetentionPolicy | None, *, is_self: bool) -> KVCache:
            memory = Memory(spec, device=model.device, max_bytes=max_bytes, poison=poison)
            wrapped = is_encoder_decoder and is_self
            return cls(model, SequenceBatch(memory, policy), layers, attachable=is_self, needs_wrapper=wrapped)

        own_cache = cache(spec, policy, is_self=True)
        if policy is not None and not own_cache.is_attached:
            raise UnsupportedError(
                f"the policy {policy.name!r} hides tokens that the mask of {type(model).__name__} shows; "
                "call stratakv.attach(model) first, then for_model"
            )
        if not is_encoder_decoder:
            return own_cache
        from stratakv.integrations.transformers.encoder_decoder import EncoderDecoderKVCache

        # Encoder rows come once and never grow: one stretch a sequence, which attention reads without a copy.
        cross = build_spec(
            [LayerSpec(s.index, s.n_kv_heads, s.k_dim, s.v_dim) for s in specs], **options, layout="growing"
        )
        return EncoderDecoderKVCache(own_cache, cache(cross, None, is_self=False))

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
        states: int = sum(
            tensor.numel() * tensor.element_size()
            for layer in self._recurrent_layers()
            for copied in (recurrent.states_of(layer),)
            for name in recurrent.STATE_NAMES
            for tensor in copied[name].values()
            if tensor is not None
        )
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

    # A step

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new rows, and give back what its attention reads.

        Args:
            key_states: `[batch, n_kv_heads, n_tokens, k_dim]`, after RoPE.
            value_states: `[batch, n_kv_heads, n_tokens, v_dim]`.
            layer_idx: the model's layer index.
            args: not used; transformers passes more in some versions.
            kwargs: likewise.

        Returns:
            Keys and values of all rows that the layer sees, or tickets for them where the model is attached.

        Raises:
            CapacityError: no room. StateError: the forward does not fit what is held. Nothing was changed.
        """
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if not isinstance(layer, KVLayer) or layer.index != layer_idx:  # a copy that the model itself appended
            raise UnsupportedError(
                f"the model stores keys and values in layer {layer_idx}, which its config gives none"
            )
        if key_states.dim() != 4 or value_states.dim() != 4:
            shapes = f"{tuple(key_states.shape)} and {tuple(value_states.shape)}"
            raise UnsupportedError(
                f"keys and values must be [batch, heads, tokens, dim], layer {layer_idx} gave {shapes}"
            )
        batch, step = self.batch, self.batch.open_step
        if step is None or layer_idx in step.written:
            self._begin(key_states)
        try:
            self._learn_shape(layer, key_states, value_states)
            n_columns, offset = self.mask_sizes(layer_idx, key_states.shape[2])
            view = batch.write(layer_idx, key_states, value_states)
        except BaseException:
            if batch.open_step is not None and not batch.open_step.written:
                batch.abort()
            raise
        if self.is_attached:
            return issue(view, n_columns, offset, self._epoch, key_states)
        keys, values = view.gather(key_states.dtype)
        if keys.shape[2] != n_columns:
            raise UnsupportedError(
                f"layer {layer_idx} holds {keys.shape[2]} rows where its mask has {n_columns} columns: rows were "
                "dropped that the model's mask shows. Call stratakv.attach(model)"
            )
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen; by one layer, where `layer_idx` names an attention layer."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        return self.batch.layer_length(layer_idx if isinstance(layer, KVLayer) else self._first_kv_layer().index)

    def get_mask_sizes(self, query: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """(columns, position of the first column) of the mask for `query` new tokens in one layer."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        index = layer_idx if isinstance(layer, KVLayer) else self._first_kv_layer().index
        return self.mask_sizes(index, query_length(query))

    def mask_sizes(self, layer_idx: int, n_queries: int) -> tuple[int, int]:
        """As `get_mask_sizes`, for an attention layer. Columns are consecutive positions, whatever rows are stored."""
        seen = self.batch.layer_length(layer_idx)
        window = self.layers[layer_idx].window
        visible = seen if window is None else min(seen, window - 1)
        return visible + n_queries, seen - visible

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The capacity, or -1 for no limit; of one layer, where named."""
        if layer_idx is None:
            return self.capacity or -1
        return int(self.layers[layer_idx].get_max_length()) if layer_idx < len(self.layers) else -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """`get_max_length` under its older name."""
        return self.get_max_length(layer_idx)

    # Going back

    def truncate(self, n_tokens: int) -> None:
        """Keep the first `n_tokens` tokens. What an incomplete forward left is taken back first.

        Raises:
            StateError: rows that a run of that length would still see are gone, or a recurrent state cannot go back.
        """
        n_remove = self.batch.seen_tokens - n_tokens
        if n_remove > 0:
            for layer in self._recurrent_layers():
                recurrent.check_croppable(layer, n_remove)
        self._epoch.advance()
        self.batch.truncate(n_tokens)
        for layer in self._recurrent_layers():
            if layer.record_past:
                recurrent.crop_states(layer, n_remove)
        if self.token_ids is not None:
            self.token_ids = tuple(ids[:n_tokens] for ids in self.token_ids)

    def crop(self, tokens: int = 0) -> None:
        """transformers' verb: 0 removes nothing, -k removes the last k tokens (all, where there are fewer).

        A positive k keeps k tokens where the installed transformers means that (below 5.15). With past recording on,
        rows that left a window are let go now.

        Raises:
            ConfigurationError: a positive k in a version where that is an error.
            StateError: as `truncate`.
        """
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

    def checkpoint(self) -> CacheCheckpoint:
        """A state to come back to with `rollback`, as often as wanted. Costs no copy of what is stored."""
        return CacheCheckpoint(self)

    def rollback(self, mark: CacheCheckpoint) -> None:
        """Return to `mark`.

        Raises:
            StateError: it was released, or made from another cache. Nothing was changed.
        """
        self.batch.rollback(mark.rows)
        self._epoch.advance()
        for index, states in mark.states.items():
            recurrent.restore_states(self.layers[index], states)
        self.token_ids = mark.token_ids

    def reset(self) -> None:
        """Forget everything, the batch size too."""
        self._epoch.advance()
        self.batch.reset()
        for layer in self._recurrent_layers():
            recurrent.reset_states(layer)
        self.token_ids = None

    def fork(self) -> KVCache:
        """A cache of its own that shares all blocks with this one; either copies a block before it writes into it."""
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__.update(self.__dict__)
        twin.batch = self.batch.fork()
        twin._epoch = Epoch()
        twin.dtypes = dict(self.dtypes)
        twin.layers = [
            layer.rebound(twin) if isinstance(layer, KVLayer) else _copied_layer(layer) for layer in self.layers
        ]
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        return self.fork()

    def __reduce__(self) -> Any:
        raise UnsupportedError("a KVCache is not pickled; use cache.save(path) and KVCache.load(path, model)")

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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence `beam_idx[i]` become sequence i. Copies nothing."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`, in that order."""
        chosen = torch.as_tensor(indices)
        if chosen.dtype == torch.bool:
            chosen = chosen.nonzero().flatten()
        self._epoch.advance()
        if self.batch.sequences:
            self.batch.select(chosen.tolist())
        for layer in self._recurrent_layers():
            recurrent.map_states(layer, lambda state: state.index_select(0, chosen.to(state.device)))
        if self.token_ids is not None:
            self.token_ids = tuple(self.token_ids[i] for i in chosen.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every sequence `repeats` times, side by side. Copies nothing."""
        n = len(self.batch.sequences)
        if n:
            self.batch_select_indices(torch.arange(n).repeat_interleave(repeats))

    # Files

    def save(self, path: str | Path, token_ids: Any = None) -> None:
        """Write everything to a self-describing file, atomically. See `stratakv.integrations.transformers.files`."""
        from stratakv.integrations.transformers.files import save_cache

        save_cache(self, Path(path), token_ids)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> KVCache:
        """The cache that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            FormatError: not such a file, or a damaged one.
            FingerprintError: written for another model, dtype or layout; the message says in what they differ.
        """
        from stratakv.integrations.transformers.files import load_cache

        return load_cache(Path(path), model)

    def restore(self, path: str | Path) -> None:
        """Replace what this cache holds by what `save` wrote. A failure of any kind leaves it as it was.

        Raises:
            As `load`.
        """
        loaded = self.load(path, self.model)
        formats, own = ((s.k_format, s.v_format, s.layout) for s in (loaded.spec, self.spec))
        if formats != own:
            raise FingerprintError(f"{path} is of format and layout {formats}, this cache of {own}")
        self._epoch.advance()
        self.batch.reset()
        loaded.batch.memory.max_bytes, loaded.batch.memory.poison = (
            self.batch.memory.max_bytes,
            self.batch.memory.poison,
        )
        self.batch, self.dtypes, self.token_ids = loaded.batch, loaded.dtypes, loaded.token_ids

    def match_prefix(self, token_ids: Any) -> int:
        """Cut the cache to what it shares with a new prompt, and say how many of its tokens need not be fed again.

        At least the prompt's last token is left to feed, since its logits are wanted.

        Args:
            token_ids: the prompt of the single sequence held, a list or a tensor `[n]` or `[1, n]`.

        Raises:
            StateError: the cache does not know its tokens (it was not saved with `token_ids`), or holds a batch.
        """
        if self.token_ids is None or len(self.token_ids) != 1:
            raise StateError("only a cache of one sequence whose token ids are known can be matched with a prompt")
        wanted = torch.as_tensor(token_ids).flatten().tolist()
        known = self.token_ids[0]
        common = next((i for i, (a, b) in enumerate(zip(known, wanted, strict=False)) if a != b), None)
        common = min(len(known), len(wanted)) if common is None else common
        common = max(min(common, len(wanted) - 1), 0)
        self.truncate(common)
        return common

    # What transformers asks

    @property
    def model(self) -> PreTrainedModel:
        """The model that this cache was made for."""
        model = self._model()
        if model is None:
            raise StateError("the model that this cache was made for is gone")
        return model

    @property
    def is_initialized(self) -> bool:
        """Whether memory for the first tokens exists."""
        return bool(self.batch.sequences)

    @property
    def is_compileable(self) -> bool:
        """Never: block tables are Python data."""
        return False

    @property
    def max_batch_size(self) -> int:
        """`batch_size` under its older name."""
        return self.batch_size

    @property
    def max_cache_len(self) -> int:
        """`get_max_length` under its older name."""
        return self.get_max_length()

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        for layer in self.layers:
            window = getattr(layer, "window", None)
            yield (
                getattr(layer, "keys", None),
                getattr(layer, "values", None),
                None if window is None else torch.tensor(window),
            )

    def __repr__(self) -> str:
        formats = "/".join(dict.fromkeys((self.spec.k_format, self.spec.v_format)))
        return (
            f"{type(self).__name__}({self.spec.layout}, {formats}, {len(self.layers)} layers, "
            f"seen={self.seen_tokens}, stored={self.stored_tokens}, nbytes={self.nbytes:,})"
        )

    def _begin(self, key_states: Tensor) -> None:
        if self.needs_wrapper and not self.announced:
            raise UnsupportedError(_BARE_DECODER_CACHE)
        self.announced = False
        self.batch.begin(key_states.shape[0], key_states.shape[2])
        self._epoch.advance()
        self.token_ids = None

    def _learn_shape(self, layer: KVLayer, keys: Tensor, values: Tensor) -> None:
        self.dtypes.setdefault(layer.index, keys.dtype)
        known = self.spec.layers_by_index[layer.index]
        shown = LayerSpec(layer.index, keys.shape[1], keys.shape[3], values.shape[3], known.window)
        if shown != known:
            self.batch.respec_layer(shown)

    def _handle(self, index: int, layer: Any) -> Any:
        if not isinstance(layer, DynamicLayer):
            return _copied_layer(layer)
        window = attention_window(layer)
        if recurrent.has_states(layer):
            return HybridLayer(self, index, window, layer.number_of_states)
        return KVLayer(self, index, window)

    def _first_kv_layer(self) -> KVLayer:
        return next(layer for layer in self.layers if isinstance(layer, KVLayer))

    def _recurrent_layers(self) -> list[Any]:
        return [layer for layer in self.layers if recurrent.has_states(layer)]


_BARE_DECODER_CACHE = (
    "a decoder's cache alone was passed to an encoder-decoder model, whose cross-attention would store its rows "
    "between the decoder's own; pass the EncoderDecoderKVCache that for_model returned"
)


class CacheCheckpoint:
    """A state of a `KVCache`. Holds blocks until it is released or garbage collected."""

    def __init__(self, cache: KVCache) -> None:
        self.rows: Checkpoint = cache.batch.checkpoint()
        self.states = {
            index: recurrent.states_of(layer) for index, layer in enumerate(cache.layers) if recurrent.has_states(layer)
        }
        self.token_ids = cache.token_ids

    @property
    def seen_tokens(self) -> int:
        """Tokens that the cache had seen."""
        return self.rows.seen_tokens

    def release(self) -> None:
        """Let go of the blocks."""
        self.rows.release()


def _copied_layer(layer: Any) -> Any:
    """A copy of one of transformers' own layers, which may hold recurrent states."""
    import copy

    return copy.deepcopy(layer)
