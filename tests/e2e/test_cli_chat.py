"""`stratakv chat`: one cache for a whole conversation, and the tokens that reading it anew would give."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_runs import FIELDS, is_one_sentence, run, start

pytestmark = pytest.mark.usefixtures("using_smollm2_cache")


def test_chat_feeds_only_what_is_new_and_reset_forgets() -> None:
    lines = "What is the capital of France?\n\nAnd of Italy?\n/nonsense\n/reset\nHi\n/exit\nnever read\n"
    result = run("chat", "--json", "--max-new-tokens", "12", stdin=lines)
    assert result.exit_code == 0
    turns = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(turns) == 3
    assert all(set(turn) == FIELDS | {"fed_tokens"} for turn in turns)
    assert "Paris" in turns[0]["text"]
    assert "Rome" in turns[1]["text"]
    assert turns[0]["fed_tokens"] == turns[0]["prompt_tokens"]
    assert turns[1]["fed_tokens"] == turns[1]["prompt_tokens"] - turns[0]["seen_tokens"]
    assert turns[1]["fed_tokens"] < 20
    assert turns[2]["fed_tokens"] == turns[2]["prompt_tokens"] < turns[1]["prompt_tokens"]
    assert is_one_sentence(result.stderr)
    assert "'/nonsense'" in result.stderr


def test_a_turn_that_does_not_fit_is_refused_and_the_chat_goes_on() -> None:
    result = run("chat", "--json", "--max-new-tokens", "8000", stdin="word " * 300 + "\n")
    assert result.exit_code == 1  # a script that piped it in looks at nothing else
    assert list(json.loads(result.stdout)) == ["error"]
    assert "reset" not in result.stderr  # it would not help
    assert is_one_sentence(result.stderr)
    assert "8,192 positions" in result.stderr


def test_ctrl_c_in_a_chat_takes_back_the_turn_and_the_chat_goes_on() -> None:
    process = start("chat", "--max-new-tokens", "400", stdin=subprocess.PIPE)
    watchdog = threading.Timer(90, process.kill)
    watchdog.start()
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("Write a very long story about the sea.\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        out, err = process.communicate("What is the capital of France? Answer in one sentence.\n", timeout=80)
    finally:
        watchdog.cancel()
    assert process.returncode == 0
    assert "Paris" in out
    assert err == "\nstratakv: interrupted; that turn was taken back\n"


@pytest.fixture(scope="module")
def loaded(smollm2_cache: Path) -> Iterator[Any]:
    from stratakv.models import load

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STRATAKV_CACHE_DIR", str(smollm2_cache))
        yield load()


def reread(loaded: Any, token_ids: list[int], n_new: int) -> list[int]:
    """Greedy continuation of all of `token_ids`, without a cache of ours."""
    import torch

    ids = torch.tensor([token_ids])
    out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n_new, do_sample=False)
    return [int(i) for i in out[0, len(token_ids) :]]


@pytest.fixture
def conversation(loaded: Any) -> Any:
    from stratakv.cli.conversation import Conversation
    from stratakv.integrations.transformers import KVCache

    return Conversation(loaded, KVCache.for_model(loaded.model, block_tokens=8))


def check_turn(loaded: Any, conversation: Any, message: str, n_new: int) -> Any:
    from stratakv.cli.generation import Decoding

    turn = conversation.ask(message, Decoding(n_new), on_token=lambda: None)
    ids = conversation.token_ids
    assert list(turn.generated.token_ids) == reread(loaded, ids[: turn.n_prompt], n_new)
    assert ids[turn.n_prompt :] == list(turn.generated.token_ids)
    assert conversation.cache.seen_tokens == len(ids) - 1
    conversation.cache.check()
    return turn


def test_a_cached_chat_continues_as_one_that_is_read_anew(loaded: Any, conversation: Any) -> None:
    turns = [
        check_turn(loaded, conversation, "What is the capital of France?", 16),  # ends by itself
        check_turn(loaded, conversation, "Tell me more.", 6),  # is cut off
        check_turn(loaded, conversation, "Thanks! 你好", 6),
    ]
    assert [turn.generated.stop_reason for turn in turns] == ["eos", "length", "length"]
    assert all(turn.n_fed < 20 for turn in turns[1:])
    text = loaded.tokenizer.decode(conversation.token_ids)
    assert text.count("<|im_start|>") == 7  # system, and a question and an answer three times
    assert text.count("<|im_end|>") == text.count("<|im_end|>\n<|im_start|>") == 6  # the last answer was cut off


def test_an_interrupted_turn_leaves_no_trace(loaded: Any, conversation: Any) -> None:
    from stratakv.cli.generation import Decoding

    check_turn(loaded, conversation, "What is the capital of France?", 16)
    ids, seen = list(conversation.token_ids), conversation.cache.seen_tokens
    left = iter(range(3))

    def interrupt() -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask("Write a long story.", Decoding(50), on_token=interrupt)
    assert (conversation.token_ids, conversation.cache.seen_tokens) == (ids, seen)
    turn = check_turn(loaded, conversation, "And of Italy?", 10)
    assert "story" not in loaded.tokenizer.decode(conversation.token_ids)
    assert "Rome" in turn.generated.text


def test_a_template_that_rewrites_the_past_is_still_read_right(
    loaded: Any, conversation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last %}Listen: {% endif %}{{ m.content }}"
        "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    monkeypatch.setattr(loaded.tokenizer, "chat_template", template)
    check_turn(loaded, conversation, "What is the capital of France?", 10)
    turn = check_turn(loaded, conversation, "And of Italy?", 10)
    text = loaded.tokenizer.decode(conversation.token_ids)
    assert text.count("Listen: ") == 1
    assert turn.n_prompt - 10 < turn.n_fed < turn.n_prompt  # the common first tokens stay


def test_text_streams_in_whole_characters(loaded: Any) -> None:
    from stratakv.cli.generation import WholeCharacters

    tokenizer = loaded.tokenizer
    text = " naïve 你好世界 👩‍👩‍👧 \n\n  done ﷽"
    ids = tokenizer("Before:" + text, add_special_tokens=False).input_ids
    context = tokenizer("Before:", add_special_tokens=False).input_ids
    assert ids[: len(context)] == context
    characters = WholeCharacters(tokenizer, context)
    pieces = [characters.push(i) for i in ids[len(context) :]]
    assert "" in pieces  # the text has characters of several tokens
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join([*pieces, characters.finish()]) == text
    cut = WholeCharacters(tokenizer, [])
    emoji = tokenizer("👩", add_special_tokens=False).input_ids
    assert [*(cut.push(i) for i in emoji[:-1]), cut.finish()] == [""] * len(emoji)
