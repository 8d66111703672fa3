"""transformers with one of its own caches: dynamic, static, or quantised by quanto or hqq."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from benchmarks.peers.hf_model import TransformersPeer
from benchmarks.peers.protocol import serve


class TransformersCache(TransformersPeer):
    """Options: `cache` ("dynamic", "static", "quanto", "hqq"), `dtype`, and `bits` for the last two."""

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
        # By default groups of 64 numbers, and the latest 128 tokens are not quantised.
        return QuantizedCache(kind, config=config, nbits=self.options["bits"])


if __name__ == "__main__":
    serve(TransformersCache())
