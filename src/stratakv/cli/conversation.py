"""A chat over one cache: each turn feeds only the tokens that the cache does not hold yet."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from stratakv.cli.generation import Decoding, Generated, OnText, continue_tokens
from stratakv.cli.prompts import check_positions
from stratakv.errors import ConfigurationError, StateError
from stratakv.integrations.transformers.prefix import common_prefix
from stratakv.models import LoadedModel


@dataclass(frozen=True)
class Turn:
    """One answer. `n_fed` tokens were run through the model before its first token."""

    generated: Generated
    n_prompt: int
    n_fed: int


class Conversation:
    """Messages, the tokens they became, and the cache that holds those tokens.

    `token_ids` is what the model really read and wrote; it is never made anew from text as long as the chat template
    only appends, since a text may have other tokens than those that were generated.

    Args:
        loaded: a model whose tokenizer has a chat template.
        cache: an empty `KVCache` for it.
        system: what the system message says, or None for the template's own.
    """

    def __init__(self, loaded: LoadedModel, cache: Any, system: str | None = None) -> None:
        if not loaded.tokenizer.chat_template:
            raise ConfigurationError(f"the model {loaded.name!r} has no chat template; use `stratakv generate`")
        self._loaded = loaded
        self._system = system
        self.cache = cache
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self.cache.reset()
        self.token_ids: list[int] = []
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._rendered = ""  # the prompt of the last turn
        self._answer = ""

    def ask(
        self, message: str, decoding: Decoding, *, on_text: OnText = lambda text: None, on_token: Callable[[], None]
    ) -> Turn:
        """Answer `message`. If that fails or is interrupted, the conversation is as it was.

        Raises:
            ConfigurationError: the model has no positions for the whole conversation.
        """
        messages = [*self._messages, {"role": "user", "content": message}]
        rendered = self._render(messages)
        token_ids = self._tokens(rendered)
        check_positions(self._loaded.model, len(token_ids), decoding.max_new_tokens)
        mark = self.cache.checkpoint()
        try:
            self._keep(common_prefix(self.token_ids[: self.cache.seen_tokens], token_ids))
            n_fed = len(token_ids) - self.cache.seen_tokens
            generated = continue_tokens(
                self._loaded.model,
                self._loaded.tokenizer,
                self.cache,
                token_ids,
                decoding,
                on_text=on_text,
                on_token=on_token,
            )
        except BaseException:
            self.cache.rollback(mark)
            raise
        finally:
            mark.release()
        self.token_ids = [*token_ids, *generated.token_ids]
        self._messages = [*messages, {"role": "assistant", "content": generated.text}]
        self._rendered, self._answer = rendered, generated.text
        return Turn(generated, len(token_ids), n_fed)

    def _tokens(self, rendered: str) -> list[int]:
        """The tokens of `rendered`: those there are, and those of the text behind them."""
        tokenizer = self._loaded.tokenizer
        tail = self._new_text(rendered) if self.token_ids else rendered
        known = self.token_ids if tail is not None else []
        text = rendered if tail is None else tail
        return [*known, *tokenizer(text, add_special_tokens=False, verbose=False).input_ids]

    def _new_text(self, rendered: str) -> str | None:
        """What `rendered` has behind the last answer, or None where the template changed what came before."""
        if not rendered.startswith(self._rendered):
            return None
        rest = rendered[len(self._rendered) :]
        for answer in (self._answer, self._answer.strip()):  # some templates strip
            if rest.startswith(answer):
                # Where generation stopped by itself, the end marker is among the tokens already.
                last = self._loaded.tokenizer.decode(self.token_ids[-1:])
                return rest[len(answer) :].removeprefix(last) if self._ended() else rest[len(answer) :]
        return None

    def _ended(self) -> bool:
        return self.token_ids[-1] in self._loaded.tokenizer.all_special_ids

    def _keep(self, n_tokens: int) -> None:
        try:
            self.cache.truncate(n_tokens)
        except StateError:  # rows that a shorter run would see have left a window: read the whole again
            self.cache.reset()

    def _render(self, messages: Sequence[dict[str, str]]) -> str:
        text = self._loaded.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        assert isinstance(text, str)
        return text


@contextmanager
def interrupts_between_tokens() -> Iterator[Callable[[], None]]:
    """Yield a function that raises KeyboardInterrupt if Ctrl-C was pressed since; a second Ctrl-C raises at once.

    So the first interrupt never strikes in the middle of the cache's bookkeeping.
    """
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield check
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
