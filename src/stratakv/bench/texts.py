"""Text to measure with, from what is installed anyway."""

from __future__ import annotations

from typing import Any

from stratakv.errors import ConfigurationError


def topics_token_ids(tokenizer: Any, n_tokens: int) -> list[int]:
    """The first tokens of the English text that comes with Python: the language reference.

    Raises:
        ConfigurationError: it has fewer than `n_tokens`.
    """
    from pydoc_data.topics import topics

    text = "\n".join(topics.values())
    ids: list[int] = tokenizer(text[: 16 * n_tokens], add_special_tokens=False, verbose=False).input_ids
    if len(ids) < n_tokens:
        raise ConfigurationError(f"Python's own text has {len(ids):,} tokens, {n_tokens:,} are needed")
    return ids[:n_tokens]
