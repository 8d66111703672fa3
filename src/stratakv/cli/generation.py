"""One run of `model.generate` over a cache: what was generated, how long each phase took, and the text as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from stratakv.integrations.transformers.compat import cache_keyword
from stratakv.models.pretrained import quiet
from stratakv.units import format_bytes

CONTEXT_TOKENS = 6  # of what precedes, so that a tokenizer that drops a first space drops it there

OnText = Callable[[str], None]


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. A temperature of 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `generate`."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,  # off: only what was asked for acts
        }


@dataclass(frozen=True)
class Seconds:
    """Time to the first token, and from there to the last."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Generated:
    """What one run gave."""

    token_ids: tuple[int, ...]
    text: str
    seconds: Seconds
    stop_reason: str  # "eos" or "length"

    @property
    def tokens_per_second(self) -> float | None:
        """Of the decode phase: tokens after the first over its seconds. None for a single token."""
        n_steps = len(self.token_ids) - 1
        return n_steps / self.seconds.decode if n_steps and self.seconds.decode else None


class WholeCharacters:
    """Turns tokens into text as they come, and holds back a character until its last byte is there."""

    def __init__(self, tokenizer: Any, context_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context_ids[-CONTEXT_TOKENS:])
        self._shown = self._decode()

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often one word, sometimes none."""
        self._ids.append(token_id)
        text = self._decode()
        if text.endswith("\ufffd"):  # part of a character
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """The text still held back, without a character that was never completed."""
        return self._advance(self._decode().rstrip("\ufffd"))

    def _advance(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._ids = self._ids[-CONTEXT_TOKENS:]
        self._shown = self._decode()
        return new

    def _decode(self) -> str:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class _Recorder:
    """The streamer that `generate` pushes tokens into."""

    def __init__(self, characters: WholeCharacters, on_text: OnText, on_token: Callable[[], None]) -> None:
        self.token_ids: list[int] = []
        self.pieces: list[str] = []
        self.times: list[float] = []
        self._characters, self._on_text, self._on_token = characters, on_text, on_token
        self._saw_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        self.times.append(time.perf_counter())
        for token_id in value.flatten().tolist():
            self.token_ids.append(token_id)
            self._emit(self._characters.push(token_id))
        self._on_token()

    def end(self) -> None:
        self._emit(self._characters.finish())

    def _emit(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            self._on_text(text)


def stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text: the model's own and the tokenizer's."""
    own = model.generation_config.eos_token_id
    ids = own if isinstance(own, list) else [own]
    return list(dict.fromkeys(i for i in (*ids, tokenizer.eos_token_id) if i is not None))


def continue_tokens(
    model: Any,
    tokenizer: Any,
    cache: Any,
    token_ids: Sequence[int],
    decoding: Decoding,
    *,
    on_text: OnText = lambda text: None,
    on_token: Callable[[], None] = lambda: None,
) -> Generated:
    """Generate what follows `token_ids`, of which the first `cache.seen_tokens` are in the cache and not fed again.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        cache: a `KVCache` for it. Afterwards it holds all but the last generated token.
        token_ids: the whole text so far.
        decoding: how tokens are chosen.
        on_text: receives text, whole characters only.
        on_token: called after every token; what it raises ends the run.
    """
    stops = stop_token_ids(model, tokenizer)
    ids = torch.tensor([list(token_ids)], device=model.device)
    recorder = _Recorder(WholeCharacters(tokenizer, token_ids), on_text, on_token)
    if decoding.seed is not None:
        torch.manual_seed(decoding.seed)
    with torch.inference_mode(), quiet():
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=recorder,
            eos_token_id=stops or None,
            pad_token_id=stops[0] if stops else 0,
            **{cache_keyword(model): cache},
            **decoding.options(),
        )
    seconds = Seconds(recorder.times[0] - start, recorder.times[-1] - recorder.times[0])
    reason = "eos" if recorder.token_ids[-1] in stops else "length"
    return Generated(tuple(recorder.token_ids), "".join(recorder.pieces), seconds, reason)


def describe(generated: Generated, cache: Any, *, model_name: str, n_prompt: int) -> dict[str, Any]:
    """The JSON object that `generate --json` prints."""
    return {
        "text": generated.text,
        "prompt_tokens": n_prompt,
        "generated_tokens": len(generated.token_ids),
        "seconds": asdict(generated.seconds),
        "tokens_per_second": generated.tokens_per_second,
        "kv_bytes": cache.nbytes,
        "seen_tokens": cache.seen_tokens,
        "stored_tokens": cache.stored_tokens,
        "waste": cache.check().waste,
        "format": "/".join(dict.fromkeys((cache.spec.k_format, cache.spec.v_format))),
        "layout": cache.spec.layout,
        "model": model_name,
        "stop_reason": generated.stop_reason,
    }


def summary(described: dict[str, Any]) -> str:
    """`describe`'s numbers in a line."""
    rate = described["tokens_per_second"]
    return (
        f"{described['generated_tokens']} tokens, {'-' if rate is None else f'{rate:.1f}'} tokens/s after "
        f"{described['seconds']['prefill']:.2f} s of prefill | KV {format_bytes(described['kv_bytes'])} "
        f"({described['format']}, {described['layout']}) | {described['seen_tokens']:,} tokens seen, "
        f"{described['stored_tokens']:,} stored | waste {described['waste']:.1%}"
    )
