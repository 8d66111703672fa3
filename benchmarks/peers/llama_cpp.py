"""llama.cpp through the low-level interface of llama-cpp-python: one `llama_decode` a step, and nothing around it."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from benchmarks.peers.protocol import Peer, Unsupported, serve

if TYPE_CHECKING:
    import numpy as np

MICRO_BATCH = 512  # llama.cpp's own default
PAD = 256  # contexts are of a multiple of this many cells


class LlamaCpp(Peer):
    """Reads a GGUF file. Options: `kv`, a type of llama.cpp's in small letters, and `attention`, "flash" or "plain".

    Flash attention, the default here, rounds keys and values in fp32 to fp16 as it reads them.
    """

    def load(self, model: str, threads: int, options: Mapping[str, Any]) -> dict[str, str]:
        """Load the weights; contexts come and go with the sequences."""
        import llama_cpp

        self._lib: Any = llama_cpp
        self._threads = threads
        self._type = getattr(llama_cpp, f"GGML_TYPE_{options['kv'].upper()}")
        flash = {"flash": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, "plain": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED}
        self._attention = flash[options.get("attention", "flash")]
        self._messages: list[str] = []  # since the last context was made
        self._log = llama_cpp.llama_log_callback(self._note)  # kept, since llama.cpp does not
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p())
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

    def feed(self, tokens: Sequence[int]) -> bytes:
        """One batch."""
        rows = [(token, self._length + i, 0) for i, token in enumerate(tokens)]
        (logits,) = self._logits(rows, {len(rows) - 1})
        self._length += len(rows)
        return logits.tobytes()

    def held_bytes(self) -> int:
        """As llama.cpp says when it makes a context, to a hundredth of a MiB."""
        found = re.findall(r"KV buffer size = +([\d.]+) MiB", "".join(self._messages))
        if not found:
            raise Unsupported("this build does not report the size of its KV buffer")
        return round(sum(map(float, found)) * (1 << 20))

    def _note(self, _level: int, text: bytes, _data: Any) -> None:
        self._messages.append(text.decode(errors="replace"))
        sys.stderr.write(self._messages[-1])

    def _new_context(self, n_cells: int, n_sequences: int) -> None:
        lib = self._lib
        if self._context is not None:
            lib.llama_batch_free(self._batch)
            lib.llama_free(self._context)
        self._messages.clear()
        self._length = 0
        params = lib.llama_context_default_params()
        params.n_ctx = -(-n_cells // PAD) * PAD
        params.n_batch = params.n_ctx
        params.n_ubatch = MICRO_BATCH
        params.n_seq_max = n_sequences
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = self._type
        params.flash_attn_type = self._attention
        params.no_perf = True
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context with these settings")
        self._batch = lib.llama_batch_init(params.n_batch, 0, 1)

    def _decode(self, rows: Sequence[tuple[int, int, int]], wanted: set[int]) -> list[int]:
        """Feed rows of (token, position, sequence), and return the likeliest tokens after the `wanted` ones."""
        return [int(logits.argmax()) for logits in self._logits(rows, wanted)]

    def _logits(self, rows: Sequence[tuple[int, int, int]], wanted: set[int]) -> list[np.ndarray[Any, Any]]:
        """Feed rows, and return the logits after the `wanted` ones, fp32 `[vocabulary]` each, until the next call."""
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
            found.append(np.frombuffer(logits.contents, dtype=np.float32))
        return found


if __name__ == "__main__":
    serve(LlamaCpp())
