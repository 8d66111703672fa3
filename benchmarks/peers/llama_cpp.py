"""llama.cpp through the low-level interface of llama-cpp-python: one `llama_decode` a step, and nothing around it."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from benchmarks.peers.protocol import Peer, serve

MICRO_BATCH = 512  # llama.cpp's own default
PAD = 256  # contexts are of a multiple of this many cells


class LlamaCpp(Peer):
    """Reads a GGUF file; flash attention. Options: `kv`, "f16" or "q8_0"."""

    def load(self, model: str, threads: int, options: Mapping[str, Any]) -> dict[str, str]:
        """Load the weights; contexts come and go with the sequences."""
        import llama_cpp

        self._lib: Any = llama_cpp
        self._threads = threads
        self._type = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}[options["kv"]]
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        self._n_vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._context: Any = None
        self._batch: Any = None
        features = llama_cpp.llama_print_system_info().decode()
        return {"llama-cpp-python": version("llama-cpp-python"), "build": " ".join(features.split())}

    def prepare(self, n_tokens: int) -> None:
        """A context of just the cells that are needed: flash attention goes over all that are in use."""
        self._new_context(n_tokens, 1)

    def prefill(self, tokens: Sequence[int]) -> int:
        """All tokens as one batch, which llama.cpp cuts into micro-batches itself."""
        (self._last,) = self._decode([(token, at, 0) for at, token in enumerate(tokens)], {len(tokens) - 1})
        self._length = len(tokens)
        return self._last

    def step(self) -> int:
        """One batch of one token."""
        (self._last,) = self._decode([(self._last, self._length, 0)], {0})
        self._length += 1
        return self._last

    def batch(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """All sequences in one cache; each step is one batch of one token of each."""
        n, length = len(prompts), len(prompts[0])
        self._new_context(n * (length + new_tokens), n)
        rows = [(token, at, i) for i, prompt in enumerate(prompts) for at, token in enumerate(prompt)]
        last = self._decode(rows, {(i + 1) * length - 1 for i in range(n)})
        steps = [last]
        for at in range(length, length + new_tokens - 1):
            last = self._decode([(token, at, i) for i, token in enumerate(last)], set(range(n)))
            steps.append(last)
        return [list(row) for row in zip(*steps, strict=True)]

    def _new_context(self, n_cells: int, n_sequences: int) -> None:
        lib = self._lib
        if self._context is not None:
            lib.llama_batch_free(self._batch)
            lib.llama_free(self._context)
        params = lib.llama_context_default_params()
        params.n_ctx = -(-n_cells // PAD) * PAD
        params.n_batch = params.n_ctx
        params.n_ubatch = MICRO_BATCH
        params.n_seq_max = n_sequences
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = self._type
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.no_perf = True
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context with these settings")
        self._batch = lib.llama_batch_init(params.n_batch, 0, 1)

    def _decode(self, rows: Sequence[tuple[int, int, int]], wanted: set[int]) -> list[int]:
        """Feed rows of (token, position, sequence), and return the likeliest tokens after the `wanted` ones."""
        import numpy as np

        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i in wanted
        status = self._lib.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        found = []
        for i in sorted(wanted):
            logits = ctypes.cast(
                self._lib.llama_get_logits_ith(self._context, i),
                ctypes.POINTER(ctypes.c_float * self._n_vocabulary),
            )
            found.append(int(np.frombuffer(logits.contents, dtype=np.float32).argmax()))
        return found


if __name__ == "__main__":
    serve(LlamaCpp())
