"""StrataKV behind a transformers model: `attach`, and a `KVCache` in the model's own dtype."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.hf_model import TransformersPeer
from benchmarks.peers.protocol import serve


class StratakvAttached(TransformersPeer):
    """Attention by our kernels, all else by transformers; or, with `native`, whole forwards by the kernels."""

    def loaded(self) -> dict[str, str]:
        """Attach, and name the instruction set that the kernels run."""
        import stratakv
        from stratakv.attention.cpu import CpuBackend
        from stratakv.extension import is_built

        stratakv.attach(self.model, native=self.options.get("native", False))
        return {"stratakv": stratakv.__version__, "kernels": CpuBackend().isa if is_built() else "not built"}

    def new_cache(self, n_tokens: int) -> Any:
        """A paged cache, which grows as it needs."""
        import stratakv

        return stratakv.KVCache.for_model(self.model, format=self.options.get("format"))


if __name__ == "__main__":
    serve(StratakvAttached())
