"""OpenVINO GenAI with paged attention: continuous batching, one `step` at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from benchmarks.peers.protocol import Peer, serve

CACHE_GIB = 1  # 8,192 tokens of the model are 0.2 GB in 16 bits
MOST_TOKENS_A_STEP = 1 << 16  # a prompt is one step, as in OpenVINO's own settings for latency


class OpenVino(Peer):
    """Reads a GGUF file. Options: `kv`, "u8" or "f16"."""

    def load(self, model: str, threads: int, options: Mapping[str, Any]) -> dict[str, str]:
        """Compile the model for the CPU."""
        import openvino
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = MOST_TOKENS_A_STEP
        scheduler.enable_prefix_caching = False  # each round feeds the same tokens
        scheduler.cache_size = CACHE_GIB
        precision = {"u8": openvino.Type.u8, "f16": openvino.Type.f16}[options["kv"]]
        properties = {"KV_CACHE_PRECISION": precision, "INFERENCE_NUM_THREADS": threads}
        self._pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self._requests = 0
        self._running: list[Any] = []
        return {"openvino": openvino.__version__, "openvino-genai": version("openvino-genai")}

    def prepare(self, n_tokens: int) -> None:
        """End the last request, and let the scheduler take it out."""
        for handle in self._running:
            handle.cancel()
        self._running = []
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        self._room = n_tokens

    def prefill(self, tokens: Sequence[int]) -> int:
        """Steps until the first token is there."""
        self._running = [self._add(tokens, self._room)]
        return self.step()

    def step(self) -> int:
        """One step of the pipeline, which ends with a token."""
        (handle,) = self._running
        while not handle.can_read():
            self._pipeline.step()
        (output,) = handle.read().values()
        (token,) = output.generated_ids
        return int(token)

    def batch(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """Continuous batching of all prompts."""
        self.prepare(new_tokens)
        handles = [self._add(prompt, new_tokens) for prompt in prompts]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return [[int(token) for token in handle.read_all()[0].generated_ids] for handle in handles]

    def _add(self, tokens: Sequence[int], new_tokens: int) -> Any:
        import numpy as np
        import openvino
        import openvino_genai as genai

        self._requests += 1
        config = genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        ids = openvino.Tensor(np.array([tokens], dtype=np.int64))
        return self._pipeline.add_request(self._requests, ids, config)


if __name__ == "__main__":
    serve(OpenVino())
