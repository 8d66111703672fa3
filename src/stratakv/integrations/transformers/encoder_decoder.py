"""The pair of caches of an encoder-decoder model."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache

from stratakv.blocks.audit import MemoryUsage
from stratakv.blocks.interrupts import uninterrupted
from stratakv.errors import StateError, UnsupportedError
from stratakv.integrations.transformers.cache import KVCache
from stratakv.integrations.transformers.checkpoint import CacheCheckpoint


class EncoderDecoderKVCache(EncoderDecoderCache):  # type: ignore[misc]  # transformers is untyped
    """A decoder's own rows, and the rows that it made of the encoder's output.

    transformers' class crops, repeats and selects `DynamicCache` only; this one does so with ours. Tokens are the
    decoder's: `truncate`, `crop` and `seen_tokens` leave the encoder's rows alone.

    Args:
        self_attention_cache: rows of the decoder's tokens.
        cross_attention_cache: rows of the encoder's output.
    """

    cross_attention_cache: KVCache

    def __init__(self, self_attention_cache: KVCache, cross_attention_cache: KVCache) -> None:
        super().__init__(self_attention_cache, cross_attention_cache)
        self.is_updated = dict.fromkeys(range(len(self_attention_cache.layers)), False)

    @property
    def self_attention_cache(self) -> KVCache:
        """The rows of the decoder's tokens. Models reach for it here in every forward; see `KVCache.reached`."""
        self._self_attention_cache.reached = True
        return self._self_attention_cache

    @self_attention_cache.setter
    def self_attention_cache(self, cache: KVCache) -> None:
        self._self_attention_cache = cache

    @property
    def nbytes(self) -> int:
        """Bytes really held by both caches."""
        return self.self_attention_cache.nbytes + self.cross_attention_cache.nbytes

    @property
    def seen_tokens(self) -> int:
        """Decoder tokens that were fed and not taken back."""
        return self.self_attention_cache.seen_tokens

    @property
    def stored_tokens(self) -> int:
        """Rows stored for each sequence of decoder tokens."""
        return self.self_attention_cache.stored_tokens

    @property
    def batch_size(self) -> int:
        """Sequences held, or -1 while empty."""
        return self.self_attention_cache.batch_size

    def check(self) -> tuple[MemoryUsage, MemoryUsage]:
        """Verify the books of both caches."""
        return self.self_attention_cache.check(), self.cross_attention_cache.check()

    def check_dynamic_cache(self, method: str) -> None:
        """Nothing to refuse: both caches can do all that transformers asks of a dynamic cache."""

    @uninterrupted
    def truncate(self, n_tokens: int) -> None:
        """Keep the first `n_tokens` decoder tokens. What an incomplete forward left in either cache is taken back."""
        self.self_attention_cache.truncate(n_tokens)
        self._drop_open_cross_step()

    @uninterrupted
    def crop(self, tokens: int = 0) -> None:
        """As `KVCache.crop`, for the decoder's tokens."""
        self.self_attention_cache.crop(tokens)
        self._drop_open_cross_step()

    @uninterrupted
    def reset(self) -> None:
        """Forget everything, the encoder's rows too."""
        self.self_attention_cache.reset()
        self.cross_attention_cache.reset()
        self.is_updated = dict.fromkeys(self.is_updated, False)

    @uninterrupted
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let sequence `beam_idx[i]` become sequence i, in both caches."""
        self.batch_select_indices(beam_idx)

    @uninterrupted
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at `indices`, in both caches."""
        both = self.self_attention_cache, self.cross_attention_cache
        chosen, _ = (cache.checked_selection(indices) for cache in both)  # both agree before either changes
        if not len(chosen):
            self.reset()
            return
        for cache in both:
            cache.batch_select_indices(chosen)

    @uninterrupted
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every sequence `repeats` times, in both caches."""
        for cache in (self.self_attention_cache, self.cross_attention_cache):
            cache.batch.check_between_steps()  # both agree before either changes
        self.self_attention_cache.batch_repeat_interleave(repeats)
        self.cross_attention_cache.batch_repeat_interleave(repeats)

    def activate_past_recording(self) -> None:
        """Keep rows that leave a window until the next `crop`."""
        self.self_attention_cache.activate_past_recording()

    @uninterrupted
    def fork(self) -> EncoderDecoderKVCache:
        """A pair of its own that shares all blocks with this one."""
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__.update(self.__dict__)
        twin.self_attention_cache = self.self_attention_cache.fork()
        twin.cross_attention_cache = self.cross_attention_cache.fork()
        twin.is_updated = dict(self.is_updated)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> EncoderDecoderKVCache:
        return self.fork()

    @uninterrupted
    def checkpoint(self) -> EncoderDecoderCheckpoint:
        """A state to come back to with `rollback`."""
        return EncoderDecoderCheckpoint(self)

    @uninterrupted
    def rollback(self, mark: EncoderDecoderCheckpoint) -> None:
        """Return to `mark`."""
        if mark.own.rows.released or mark.cross.rows.released:
            raise StateError("the checkpoint was released")
        self.self_attention_cache.rollback(mark.own)
        self.cross_attention_cache.rollback(mark.cross)
        self.is_updated = dict(mark.is_updated)

    @uninterrupted
    def _drop_open_cross_step(self) -> None:
        """The encoder's rows come whole with the first forward; where that stopped, none of them is left."""
        if self.cross_attention_cache.batch.open_step is not None:
            self.cross_attention_cache.reset()
            self.is_updated = dict.fromkeys(self.is_updated, False)

    def save(self, path: Any, token_ids: Any = None) -> None:
        """Refused."""
        raise UnsupportedError("files hold decoder-only caches; an encoder-decoder's cross rows depend on its input")


class EncoderDecoderCheckpoint:
    """A state of an `EncoderDecoderKVCache`."""

    def __init__(self, cache: EncoderDecoderKVCache) -> None:
        self.own: CacheCheckpoint = cache.self_attention_cache.checkpoint()
        self.cross: CacheCheckpoint = cache.cross_attention_cache.checkpoint()
        self.is_updated = dict(cache.is_updated)

    @uninterrupted
    def release(self) -> None:
        """Let go of the blocks."""
        self.own.release()
        self.cross.release()
