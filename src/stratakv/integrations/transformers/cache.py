"""`KVCache`: our pages behind transformers' cache interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratakv.blocks.batch import SequenceBatch
from stratakv.blocks.budget import Budget
from stratakv.blocks.geometry import build_spec
from stratakv.blocks.memory import Memory
from stratakv.codecs import codec_names
from stratakv.codecs.floats import FORMAT_OF_DTYPE
from stratakv.errors import UnsupportedError
from stratakv.integrations.transformers.compat import PreTrainedModel, query_length
from stratakv.integrations.transformers.geometry import layer_specs, servable_layers
from stratakv.integrations.transformers.gradients import without_gradients
from stratakv.integrations.transformers.layers import KVLayer
from stratakv.integrations.transformers.state import CacheState
from stratakv.integrations.transformers.tickets import issue
from stratakv.policies import RetentionPolicy
from stratakv.spec import CacheSpec, LayerSpec
from stratakv.units import parse_bytes


class KVCache(CacheState):
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
        attachable: bool = True,
        needs_wrapper: bool = False,
        exact: bool = False,
    ) -> None:
        super().__init__(model, batch, layers, attachable=attachable)
        self.exact = exact
        self.needs_wrapper = needs_wrapper
        self.reached = False
        """Of an encoder-decoder's: whether the model got here by the wrapper since the last step began. Where it holds
        this cache alone, cross-attention stores its rows here, in a step of their own that no wrapper announced."""

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
        residual: int | None = None,
        memory: int | str | None = None,
        poison: bool = False,
    ) -> Any:
        """A cache for `model`, to be passed to `generate` or `forward` as `cache=` (`past_key_values=` before).

        Args:
            model: a transformers model with a decoder.
            format: how keys and values are stored, one of `codec_names()`. None: as the model computes, exactly.
            k_format: the same for keys alone.
            v_format: the same for values alone.
            layout: `paged` (slabs of blocks; growth copies nothing), `contiguous` (preallocated, takes `capacity`) or
                `growing` (one stretch a sequence, doubled when full).
            block_tokens: rows in a block, for `paged`.
            capacity: tokens of a sequence that layers without a window can hold, for `contiguous`.
            residual: how many of the last tokens are also held in 16 bits, and read from there; with them the first
                few, where a format asks for those. Only for formats of 8 bits or fewer. None: as the format asks (64
                for `int4` and `int2`, 16 for `int8` and `fp8`).
            policy: which tokens stay. Needs `stratakv.attach(model)` first, since no mask of the model expresses it.
            memory: most bytes to hold, as a number or like `"2GiB"`. None: no limit.
            poison: overwrite freed blocks with NaN, to make stale reads visible. For tests.

        Returns:
            A `KVCache`; for an encoder-decoder an `EncoderDecoderKVCache`.

        Raises:
            ConfigurationError: an argument is out of range.
            UnsupportedError: the model, or the combination, cannot be served; the message says why.
        """
        layers = servable_layers(model)
        own = FORMAT_OF_DTYPE.get(model.dtype)
        if format is None and own is None and (k_format is None or v_format is None):
            raise UnsupportedError(f"no format stores {model.dtype} exactly; choose one of {', '.join(codec_names())}")
        chosen = own if format is None else format
        exact = format is None and k_format is None and v_format is None
        options: dict[str, Any] = {
            "k_format": chosen if k_format is None else k_format,
            "v_format": chosen if v_format is None else v_format,
            "block_tokens": block_tokens,
            "recent_format": "fp16" if model.dtype == torch.float16 else "bf16",
        }
        specs = layer_specs(model.config, layers)
        spec = build_spec(specs, **options, layout=layout, capacity=capacity, policy=policy, residual=residual)
        budget = Budget(None if memory is None else parse_bytes(memory))
        is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))

        def cache(spec: CacheSpec, policy: RetentionPolicy | None, *, is_self: bool) -> KVCache:
            memory = Memory(spec, device=model.device, budget=budget, poison=poison)
            wrapped = is_encoder_decoder and is_self
            batch = SequenceBatch(memory, policy)
            return cls(model, batch, layers, attachable=is_self, needs_wrapper=wrapped, exact=exact)

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
            [LayerSpec(s.index, s.n_kv_heads, s.k_dim, s.v_dim) for s in specs],
            **options,
            layout="growing",
            comes_once=True,
        )
        return EncoderDecoderKVCache(own_cache, cache(cross, None, is_self=False))

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
        try:
            if step is None or layer_idx in step.written:
                self._begin(key_states)
            self._learn_shape(layer, key_states, value_states)
            n_columns, offset = self.mask_sizes(layer_idx, key_states.shape[2])
            view = batch.write(layer_idx, key_states, value_states)
        except BaseException:
            if batch.open_step is not None and not batch.open_step.written:
                batch.abort()
            raise
        if batch.open_step is None:
            self.token_ids = None  # what was fed is not known
        self._fed.note_rows(layer_idx)
        if self.is_attached:
            return issue(view, n_columns, offset, self._epoch, key_states)
        keys, values = view.gather(key_states.dtype)
        if keys.shape[2] != n_columns:
            raise UnsupportedError(
                f"layer {layer_idx} holds {keys.shape[2]} rows where its mask has {n_columns} columns: rows were "
                "dropped that the model's mask shows. Call stratakv.attach(model)"
            )
        if key_states.requires_grad or value_states.requires_grad:
            keys = without_gradients(keys, "stored keys", key_states)
            values = without_gradients(values, "stored values", value_states)
        return keys, values

    def feed(self, run: Callable[[SequenceBatch], Tensor], dtype: torch.dtype) -> Tensor:
        """A whole forward by something that writes the rows of all layers itself.

        Args:
            run: feeds the batch one step; where it fails, the batch has the tokens that it had.
            dtype: what it computes keys and values as.

        Returns:
            What `run` gave.
        """
        self._epoch.advance()
        found = run(self.batch)
        self.token_ids = None  # what was fed is not known
        for layer in self.layers:
            self.dtypes.setdefault(layer.index, dtype)
        return found

    def stores_as(self, dtype: torch.dtype) -> bool:
        """Whether rows of `dtype` may be stored: in a cache that is to be exact, they are not rounded."""
        return not self.exact or dtype in _STORED_EXACTLY[self.spec.k_format]  # one format for keys and values then

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen; by one layer, where `layer_idx` names an attention layer."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        return self.batch.layer_length(layer_idx if isinstance(layer, KVLayer) else self._first_kv_layer().index)

    def get_mask_sizes(self, query: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """(columns, position of the first column) of the mask for `query` new tokens in one layer."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        index = layer_idx if isinstance(layer, KVLayer) else self._first_kv_layer().index
        return self.mask_sizes(index, query_length(query))

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The capacity, or -1 for no limit; of one layer, where named."""
        if layer_idx is None:
            return self.capacity or -1
        return int(self.layers[layer_idx].get_max_length()) if layer_idx < len(self.layers) else -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """`get_max_length` under its older name."""
        return self.get_max_length(layer_idx)

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
            ConfigurationError: `model` is none.
        """
        from stratakv.integrations.transformers.files import load_cache

        return load_cache(Path(path), model)

    def restore(self, path: str | Path) -> None:
        """Replace what this cache holds by what `save` wrote. A failure of any kind leaves it as it was.

        Raises:
            As `load`, and FingerprintError where the file's cache has other settings than this one, CapacityError
            where it is larger than this one may be.
        """
        from stratakv.integrations.transformers.files import restore_cache

        restore_cache(self, Path(path))

    def match_prefix(self, token_ids: Any) -> int:
        """Cut the cache to what it shares with a new prompt, and say how many of its tokens need not be fed again.

        At least the prompt's last token is left to feed, since its logits are wanted.

        Args:
            token_ids: the prompt of the single sequence held, a list or a tensor `[n]` or `[1, n]`.

        Raises:
            StateError: the cache does not know its tokens (it was not saved with `token_ids`), or holds a batch.
            ConfigurationError: not one prompt of at least one token. Nothing was changed.
        """
        from stratakv.integrations.transformers.prefix import match_prefix

        return match_prefix(self, token_ids)

    # What transformers asks

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
                None if window is None else torch.tensor(window, device="cpu"),
            )

    def __repr__(self) -> str:
        formats = "/".join(dict.fromkeys((self.spec.k_format, self.spec.v_format)))
        return (
            f"{type(self).__name__}({self.spec.layout}, {formats}, {len(self.layers)} layers, "
            f"seen={self.seen_tokens}, stored={self.stored_tokens}, nbytes={self.nbytes:,})"
        )

    def _begin(self, key_states: Tensor) -> None:
        if self.needs_wrapper and not self.reached:
            raise UnsupportedError(_BARE_DECODER_CACHE)
        self.reached = False
        self._fed.check(self.batch.seen_tokens, between_forwards=False)
        if not key_states.shape[0] or not key_states.shape[2]:
            raise UnsupportedError(f"a forward has at least one sequence and token, this one {key_states.shape[::2]}")
        if any(group.imposed for group in self.spec.groups) and not self.is_attached:
            raise UnsupportedError(
                "this cache has a policy, which the model's own attention knows nothing of; call stratakv.attach(model)"
            )
        self.batch.begin(key_states.shape[0], key_states.shape[2])
        self._epoch.advance()

    def _learn_shape(self, layer: KVLayer, keys: Tensor, values: Tensor) -> None:
        for rows in (keys, values):
            if not self.stores_as(rows.dtype):
                raise UnsupportedError(
                    f"the cache was made to store what the model computes exactly, in {self.spec.k_format}, and now it "
                    f"computes {rows.dtype}; make a new one, or choose a format"
                )
        self.dtypes.setdefault(layer.index, keys.dtype)
        known = self.spec.layers_by_index[layer.index]
        shown = keys.shape[1], keys.shape[3], values.shape[3]
        if shown != (known.n_kv_heads, known.k_dim, known.v_dim):
            self.batch.respec_layer(LayerSpec(layer.index, *shown, known.window))

    def _first_kv_layer(self) -> KVLayer:
        return next(layer for layer in self.layers if isinstance(layer, KVLayer))


_STORED_EXACTLY = {"fp32": tuple(FORMAT_OF_DTYPE), "bf16": (torch.bfloat16,), "fp16": (torch.float16,)}

_BARE_DECODER_CACHE = (
    "a decoder's cache alone was passed to an encoder-decoder model, whose cross-attention would store its rows "
    "between the decoder's own; pass the EncoderDecoderKVCache that for_model returned"
)
