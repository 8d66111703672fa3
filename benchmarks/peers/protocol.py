"""A worker's side of a measurement: one request a line on stdin, one answer a line on stdout, both JSON.

    {"do": "load", "model": folder or file, "threads": 2, ...}   -> {"versions": {...}, "seconds": ...}
    {"do": "prefill", "tokens": [...], "room": 41}               -> {"seconds": ..., "token": first new one}
    {"do": "decode", "n": 40}                                    -> {"seconds": [one a step], "tokens": [...]}
    {"do": "batch", "prompts": [[...], ...], "new_tokens": 64}   -> {"seconds": ..., "output_tokens": ...}
    {"do": "follow", "tokens": [...], "prefilled": 256, "logits": file}
                                                                 -> {"seconds": [one a step], "bytes": of the cache}
    {"do": "rss"}                                                -> {"now": bytes, "peak": bytes}
    {"do": "exit"}                                               -> {}

Decoding is greedy and goes on from the prefill. `follow` feeds given tokens, and writes the logits after the prefilled
ones and after each further one, but the last, into the file: fp32, in the machine's byte order. A request that fails is
answered with {"error": reason}, one that the peer cannot serve at all with {"unsupported": reason}; the worker goes on
either way. Time is taken here, in one way for all: the choice of the token belongs to it, what `prepare` does does not.

Standard library only: this file is imported in every peer's venv.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

Answer = dict[str, Any]


class Unsupported(Exception):  # noqa: N818  an answer, not an error
    """The peer has no way to do this; the text says why."""


class Peer(ABC):
    """One way to run the model: weights, cache, attention."""

    @abstractmethod
    def load(self, model: str, threads: int, options: Mapping[str, Any]) -> dict[str, str]:
        """Load the model and return the versions of what runs it."""

    @abstractmethod
    def prepare(self, n_tokens: int) -> None:
        """Forget the last sequence, and make ready for one that will grow to `n_tokens`. Not timed."""

    @abstractmethod
    def prefill(self, tokens: Sequence[int]) -> int:
        """Feed a prompt and return the token that the model would say next."""

    @abstractmethod
    def step(self) -> int:
        """Feed the token returned last and return the next."""

    def batch(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """Continue all prompts by `new_tokens` each, together. The prompts are of one length.

        Raises:
            Unsupported: the peer has one sequence at a time.
        """
        raise Unsupported("it runs one sequence at a time")

    def feed(self, tokens: Sequence[int]) -> bytes:
        """Feed tokens after those that were fed before, and return the logits after the last of them, in fp32.

        Raises:
            Unsupported: the peer shows no logits.
        """
        raise Unsupported("it shows no logits")

    def held_bytes(self) -> int:
        """Bytes that the cache has allocated.

        Raises:
            Unsupported: the peer does not say.
        """
        raise Unsupported("it does not say how many bytes its cache has")


def serve(peer: Peer) -> None:
    """Answer requests to `peer` until `exit` or the end of stdin."""

    def load(model: str, threads: int, **options: Any) -> Answer:
        seconds, versions = _timed(lambda: peer.load(model, threads, options))
        return {"seconds": seconds, "versions": versions}

    def prefill(tokens: list[int], room: int = 1) -> Answer:
        peer.prepare(len(tokens) + room)
        gc.collect()
        seconds, token = _timed(lambda: peer.prefill(tokens))
        return {"seconds": seconds, "token": token}

    def decode(n: int) -> Answer:
        steps = [_timed(peer.step) for _ in range(n)]
        return {"seconds": [seconds for seconds, _ in steps], "tokens": [token for _, token in steps]}

    def batch(prompts: list[list[int]], new_tokens: int) -> Answer:
        gc.collect()
        seconds, found = _timed(lambda: peer.batch(prompts, new_tokens))
        return {"seconds": seconds, "output_tokens": sum(map(len, found)), "first": [tokens[0] for tokens in found]}

    def follow(tokens: list[int], prefilled: int, logits: str) -> Answer:
        peer.prepare(len(tokens))
        steps = []
        with Path(logits).open("wb") as out:
            out.write(peer.feed(tokens[:prefilled]))
            for token in tokens[prefilled:-1]:
                seconds, found = _timed(partial(peer.feed, [token]))
                steps.append(seconds)
                out.write(found)
        return {"seconds": steps, "bytes": peer.held_bytes()}

    serve_calls({"load": load, "prefill": prefill, "decode": decode, "batch": batch, "follow": follow, "rss": _memory})


def serve_calls(calls: Mapping[str, Callable[..., Answer]]) -> None:
    """Answer each request by the function of that name, which takes what else is in the request.

    What libraries print goes to stderr.
    """
    answers = _claim_stdout()
    for line in sys.stdin:
        request = json.loads(line)
        verb = request.pop("do")
        answer = {} if verb == "exit" else _answer(calls, verb, request)
        print(json.dumps(answer), file=answers, flush=True)
        if verb == "exit":
            break
    os._exit(0)  # some engines hang, or crash, in their destructors


def _claim_stdout() -> TextIO:
    """Keep stdout for answers alone: whatever else writes to it, in any language, writes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers


def _answer(calls: Mapping[str, Callable[..., Answer]], verb: str, request: dict[str, Any]) -> Answer:
    try:
        return calls[verb](**request)
    except Unsupported as reason:
        return {"unsupported": str(reason)}
    except Exception as error:  # whatever a library raises is a result of the measurement
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def _memory() -> Answer:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    now, peak = (1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return {"now": now, "peak": peak}
