"""A transformers model, with whatever cache a subclass makes."""

from __future__ import annotations

import inspect
import platform
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.peers.protocol import Peer

if TYPE_CHECKING:
    import torch


class TransformersPeer(Peer):
    """Forwards of the model itself, never `generate`: nothing but the model, its cache and an argmax is timed."""

    def load(self, model: str, threads: int, options: Mapping[str, Any]) -> dict[str, str]:
        """Load a folder in `options["dtype"]`: bf16 or fp32."""
        import torch
        import transformers

        torch.set_num_threads(threads)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[options["dtype"]]
        self.options = options
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, local_files_only=True
        ).eval()
        parameters = inspect.signature(self.model.forward).parameters
        self._keyword = "cache" if "cache" in parameters else "past_key_values"
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            **self.loaded(),
        }

    def loaded(self) -> dict[str, str]:
        """Change the model where the peer does, and return further versions."""
        return {}

    @abstractmethod
    def new_cache(self, n_tokens: int) -> Any:
        """An empty cache for sequences of up to `n_tokens`."""

    def prepare(self, n_tokens: int) -> None:
        """An empty cache; the last one is freed first."""
        self._cache: Any = None
        self._cache = self.new_cache(n_tokens)

    def prefill(self, tokens: Sequence[int]) -> int:
        """One forward; the logits of the last token alone are computed, as `generate` does it."""
        self._last = self._likeliest([list(tokens)])
        return int(self._last)

    def step(self) -> int:
        """One forward of one token."""
        self._last = self._likeliest(self._last[:, None])
        return int(self._last)

    def batch(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """All prompts as the rows of one batch; as they are of one length, nothing is padded."""
        self.prepare(len(prompts[0]) + new_tokens)
        last = self._likeliest([list(prompt) for prompt in prompts])
        steps = [last.tolist()]
        for _ in range(new_tokens - 1):
            last = self._likeliest(last[:, None])
            steps.append(last.tolist())
        return [list(row) for row in zip(*steps, strict=True)]

    def feed(self, tokens: Sequence[int]) -> bytes:
        """One forward."""
        logits: bytes = self._forward([list(tokens)])[0].float().numpy().tobytes()
        return logits

    def _likeliest(self, ids: list[list[int]] | torch.Tensor) -> torch.Tensor:
        """The likeliest next tokens, int64 `[n_sequences]`."""
        return self._forward(ids).argmax(-1)

    def _forward(self, ids: list[list[int]] | torch.Tensor) -> torch.Tensor:
        """The logits of the next tokens, `[n_sequences, vocabulary]`."""
        import torch

        with torch.inference_mode():
            output = self.model(
                input_ids=self._tensor(ids), **{self._keyword: self._cache}, use_cache=True, logits_to_keep=1
            )
            found: torch.Tensor = output.logits[:, -1]
        return found

    @staticmethod
    def _tensor(ids: list[list[int]] | torch.Tensor) -> torch.Tensor:
        import torch

        return ids if isinstance(ids, torch.Tensor) else torch.tensor(ids)
