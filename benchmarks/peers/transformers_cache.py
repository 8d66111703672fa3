"""transformers with one of its own caches: dynamic, static, or quantised by quanto or hqq."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from benchmarks.peers.hf_model import TransformersPeer
from benchmarks.peers.protocol import serve

if TYPE_CHECKING:
    import torch


class TransformersCache(TransformersPeer):
    """Options: `cache` ("dynamic", "static", "quanto", "hqq"), `dtype`, and for the last two `bits` and `axis`."""

    def loaded(self) -> dict[str, str]:
        """The version of what quantises."""
        packages = {"quanto": "optimum-quanto", "hqq": "hqq"}
        name = packages.get(self.options["cache"])
        return {} if name is None else {name: version(name)}

    def new_cache(self, n_tokens: int) -> Any:
        """The cache that the options name, with transformers' own settings for all else."""
        from transformers import DynamicCache, QuantizedCache, StaticCache

        kind, config = self.options["cache"], self.model.config
        if kind == "dynamic":
            return DynamicCache(config=config)
        if kind == "static":
            return StaticCache(config=config, max_cache_len=n_tokens)
        # By default the axis is 0, groups have 64 numbers, and the latest 128 tokens are not quantised.
        axes = dict.fromkeys(("axis_key", "axis_value"), self.options["axis"]) if "axis" in self.options else {}
        return QuantizedCache(kind, config=config, nbits=self.options["bits"], **axes)

    def held_bytes(self) -> int:
        """Of all memory under the tensors that the layers hold, each piece counted once."""
        memory = (tensor.untyped_storage() for layer in self._cache.layers for tensor in _tensors(vars(layer)))
        return sum({storage.data_ptr(): storage.nbytes() for storage in memory}.values())


def _tensors(holder: Any) -> Iterator[torch.Tensor]:
    """The plain tensors in a tensor, a list, a tuple or a dict; those of quanto are made of others."""
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if is_traceable_wrapper_subclass(holder):
        names, _ = holder.__tensor_flatten__()
        yield from _tensors([getattr(holder, name) for name in names])
    elif isinstance(holder, torch.Tensor):
        yield holder
    elif isinstance(holder, dict):
        yield from _tensors(list(holder.values()))
    elif isinstance(holder, list | tuple):
        for each in holder:
            yield from _tensors(each)


if __name__ == "__main__":
    serve(TransformersCache())
