"""StrataKV's own runner: a whole forward in C++, over pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.peers.hf_model import TransformersPeer
from benchmarks.peers.protocol import serve

if TYPE_CHECKING:
    import torch


class StratakvNative(TransformersPeer):
    """The weights of the model in transformers, which is then let go."""

    def load(self, model: str, threads: int, options: Mapping[str, Any]) -> dict[str, str]:
        """Load a folder, and copy its weights in `options["dtype"]`."""
        import torch

        versions = super().load(model, threads, options)
        from stratakv.models.native import NativeRunner

        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[options["dtype"]]
        self._runner = NativeRunner(self.model, dtype=dtype)
        self.model = None
        return versions

    def loaded(self) -> dict[str, str]:
        """Our own version, and the instruction set that the kernels run."""
        import stratakv
        from stratakv.attention.cpu import CpuBackend

        return {"stratakv": stratakv.__version__, "kernels": CpuBackend().isa}

    def new_cache(self, n_tokens: int) -> Any:
        """A paged cache, which grows as it needs."""
        return self._runner.new_batch(format=self.options["format"])

    def _likeliest(self, ids: list[list[int]] | torch.Tensor) -> torch.Tensor:
        return self._runner.next_tokens(self._cache, self._tensor(ids))[:, 0]

    def _forward(self, ids: list[list[int]] | torch.Tensor) -> torch.Tensor:
        return self._runner.forward(self._cache, self._tensor(ids))[:, 0]


if __name__ == "__main__":
    serve(StratakvNative())
