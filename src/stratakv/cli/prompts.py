"""Where the prompt comes from, and whether the model can take it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from stratakv.errors import ConfigurationError


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The text of `--prompt` or of `--file` (`-` is standard input).

    Raises:
        ConfigurationError: both or neither were given, the text is empty or not UTF-8, or the file cannot be read.
    """
    if (prompt is None) == (file is None):
        raise ConfigurationError(
            "the prompt is missing: give --prompt TEXT or --file PATH"
            if prompt is None
            else "--prompt and --file were both given; give one of them"
        )
    text = _read(file) if file is not None else prompt
    assert text is not None
    if not text:
        raise ConfigurationError("the prompt is empty" if file is None else f"{_said(file)} is empty")
    check_text(text, "the prompt")
    return text


def check_text(text: str, name: str) -> None:
    """Raise ConfigurationError where `text` holds bytes that the shell could not decode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigurationError(f"{name} is not UTF-8 at character {error.start}") from None


def check_positions(model: Any, n_prompt: int, n_new: int) -> None:
    """Raise ConfigurationError where the prompt and what is to follow are more than the model has positions for."""
    from stratakv.integrations.transformers.geometry import max_positions

    limit = max_positions(model)
    if limit is not None and n_prompt + n_new > limit:
        raise ConfigurationError(
            f"the prompt has {n_prompt:,} tokens, which with {n_new:,} new ones is {n_prompt + n_new:,}; "
            f"the model has {limit:,} positions"
        )


def _said(file: Path) -> str:
    return "standard input" if str(file) == "-" else str(file)


def _read(file: Path) -> str:
    try:
        content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except FileNotFoundError:
        raise ConfigurationError(f"{file} does not exist") from None
    except IsADirectoryError:
        raise ConfigurationError(f"{file} is a directory; --file takes a text file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"{str(file)!r} cannot be read: {reason}") from None
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{_said(file)} is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}"
        ) from None
