"""The ways to run a model that the speed benchmarks compare: ours, and transformers' own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stratakv.bench.samples import seconds_of
from stratakv.blocks.geometry import build_spec
from stratakv.codecs.floats import FORMAT_OF_DTYPE
from stratakv.errors import ConfigurationError
from stratakv.integrations.transformers import KVCache, attach
from stratakv.integrations.transformers.compat import DynamicCache, cache_keyword
from stratakv.integrations.transformers.geometry import layer_specs, servable_layers
from stratakv.models.native import NativeRunner
from stratakv.spec import CacheSpec


class Subject(ABC):
    """Sequences of equal length that are fed and continued greedily.

    Args:
        model: what is run, or what it was made from.
        weight_dtype: of the matrices.
    """

    name: str

    def __init__(self, model: Any, weight_dtype: torch.dtype) -> None:
        config = model.config.get_text_config(decoder=True)
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        matrices = [p for p in model.parameters() if p.dim() > 1 and p is not embedding and p is not head]
        self._numbers = sum(p.numel() for p in matrices)
        self._head_numbers = head.numel()
        self._weight_dtype = weight_dtype
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._query_numbers = config.num_hidden_layers * config.num_attention_heads * head_dim

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one step reads: all matrices; of the embedding only a row."""
        return int((self._numbers + self._head_numbers) * self._weight_dtype.itemsize)

    def operations(self, n_tokens: int) -> int:
        """Multiplications and additions of a prefill of `n_tokens`, windows left out of account."""
        matrices = 2 * self._numbers * n_tokens + 2 * self._head_numbers
        pairs = n_tokens * (n_tokens + 1) // 2
        return int(matrices + 4 * self._query_numbers * pairs)

    @abstractmethod
    def start(self) -> None:
        """Forget everything."""

    @abstractmethod
    def feed(self, tokens: Tensor) -> Tensor:
        """Feed int64 `[n_sequences, n_new]`; returns the likeliest next token of each, `[n_sequences, 1]`."""

    @property
    @abstractmethod
    def cache_spec(self) -> CacheSpec:
        """What the cache holds, and in what."""

    def prefill_seconds(self, tokens: Tensor) -> tuple[float, Tensor]:
        """Feed a prompt from the start: seconds, and the next tokens."""
        self.start()
        return self._timed(tokens)

    def decode_seconds(self, next_tokens: Tensor, n_steps: int) -> tuple[list[float], Tensor]:
        """Go on for `n_steps`: seconds of each step, and the next tokens."""
        seconds = []
        for _ in range(n_steps):
            step, next_tokens = self._timed(next_tokens)
            seconds.append(step)
        return seconds, next_tokens

    def _timed(self, tokens: Tensor) -> tuple[float, Tensor]:
        found: list[Tensor] = []
        return seconds_of(lambda: found.append(self.feed(tokens))), found[0]


class NativeSubject(Subject):
    """The native runner over pages."""

    name = "native"

    def __init__(self, model: Any, dtype: torch.dtype, format: str, block_tokens: int = 64) -> None:
        super().__init__(model, dtype)
        self._runner = NativeRunner(model, dtype=dtype)
        self._new = lambda: self._runner.new_batch(format=format, block_tokens=block_tokens)
        self._batch = self._new()

    def start(self) -> None:
        """An empty cache."""
        self._batch = self._new()

    def feed(self, tokens: Tensor) -> Tensor:
        """One forward."""
        return self._runner.next_tokens(self._batch, tokens)

    @property
    def cache_spec(self) -> CacheSpec:
        """That of the pages."""
        return self._batch.memory.spec


class _ModelSubject(Subject):
    def __init__(self, model: Any, new_cache: Callable[[], Any], format: str | None = None) -> None:
        super().__init__(model, model.dtype)
        stored = format or FORMAT_OF_DTYPE[model.dtype]
        layers = layer_specs(model.config, servable_layers(model))
        self._spec = build_spec(layers, k_format=stored, v_format=stored)
        self._model, self._new_cache = model, new_cache
        self._keyword = cache_keyword(model)
        self._cache = new_cache()

    def start(self) -> None:
        """An empty cache."""
        self._cache = self._new_cache()

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        """One forward, whose logits are those of the last token alone."""
        logits = self._model(tokens, **{self._keyword: self._cache}, logits_to_keep=1).logits
        return torch.as_tensor(logits[:, -1:].argmax(dim=-1))

    @property
    def cache_spec(self) -> CacheSpec:
        """In the format asked for, or the model's own dtype."""
        return self._spec


class AttachedSubject(_ModelSubject):
    """The model in transformers, its attention by our kernels over pages."""

    name = "attached"

    def __init__(self, model: Any, format: str | None = None, block_tokens: int = 64) -> None:
        attach(model)
        super().__init__(model, lambda: KVCache.for_model(model, format=format, block_tokens=block_tokens), format)


class DynamicSubject(_ModelSubject):
    """The model in transformers with its DynamicCache."""

    name = "dynamic"

    def __init__(self, model: Any) -> None:
        super().__init__(model, DynamicCache)


def make_subject(name: str, model_in: Callable[[torch.dtype], Any], dtype: torch.dtype, format: str) -> Subject:
    """The subject of this name, of a model that `model_in` loads in the dtype asked for, for it alone.

    Raises:
        ConfigurationError: there is none.
    """
    if name == "native":
        return NativeSubject(model_in(torch.float32), dtype, format)
    if name == "attached":
        return AttachedSubject(model_in(dtype), format)
    if name == "dynamic":
        return DynamicSubject(model_in(dtype))
    raise ConfigurationError(f"{name!r} is not one of {', '.join(SUBJECTS)}")


SUBJECTS = ("native", "attached", "dynamic")
